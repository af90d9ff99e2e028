"""Tokenizers from Mistral's own file, from folders of other families, and the form in which they are saved."""

from __future__ import annotations

import json
import threading
from importlib.resources import files
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from ostro.errors import DataError, LayoutError, RecipeError
from ostro.models.tokenizer import TextTokenizer, check_vocabulary, cut_tekken, load_tokenizer
from tests.helpers.tiny import text_config

TEXTS = [
    "APT28 used a spear-phishing  attachment to run PowerShell.",
    "",
    "Ein Überblick: naïve façade, 日本語のテキスト, emoji 🦊\n\ttab  and   spaces ",
    "x = {'a': 1234567890}\r\n// comment",
    "\x00\x7f control and e\u0301 combining",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tekken8192")
    cut_tekken(8192, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(folder)


def test_cut_keeps_the_special_ids_and_fits_its_size(folder: Path, tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == 8192
    assert tokenizer.pad_token_id == 11
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12, "[IMG_END]": 13}
    assert {token: tokenizer.fast.convert_tokens_to_ids(token) for token in expected} == expected
    assert (folder / "tekken.json").stat().st_size < 500_000


def test_cut_encodes_as_mistral_common_does(folder: Path, tokenizer: TextTokenizer) -> None:
    reference = Tekkenizer.from_file(folder / "tekken.json")
    assert reference.n_words == 8192
    assert tokenizer.encode(TEXTS, 512) == [reference.encode(text, bos=True, eos=False) for text in TEXTS]


def test_text_survives_the_cut(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(TEXTS, 512)
    assert [tokenizer.fast.decode(row, skip_special_tokens=True) for row in ids] == TEXTS


@pytest.mark.parametrize("vocab_size", [1255, 131073])
def test_cut_to_an_impossible_size_is_refused(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"vocab_size: must be between 1256 .* and 131072, got {vocab_size}"):
        cut_tekken(vocab_size, tmp_path)


def test_bytes_alone_encode_anything(tmp_path: Path) -> None:
    cut_tekken(1256, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXTS, 512)
    assert max(max(row) for row in ids) < 1256
    assert [tokenizer.fast.decode(row, skip_special_tokens=True) for row in ids] == TEXTS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only Mistral's own file, as consolidated repositories do."""
    path = tmp_path_factory.mktemp("tekken")
    source = files("mistral_common") / "data" / "tekken_240911.json"
    (path / "tekken.json").write_bytes(source.read_bytes())
    return path


def test_whole_tekken_and_its_saved_form_encode_as_mistral_common_does(whole: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(whole)
    reference = Tekkenizer.from_file(whole / "tekken.json")
    expected = [reference.encode(text, bos=True, eos=False) for text in TEXTS]
    assert tokenizer.vocab_size == 131072
    assert tokenizer.encode(TEXTS, 512) == expected
    # A Mistral-Small-3.x folder of before transformers 5: the split pattern of its tokenizer.json ignores letter case.
    tokenizer.save(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.50.0"}))
    assert load_tokenizer(tmp_path).encode(TEXTS, 512) == expected


def test_saved_form_needs_no_ostro(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    expected = tokenizer.encode(TEXTS, 512)
    assert load_tokenizer(tmp_path).encode(TEXTS, 512) == expected
    # The Rust file alone, as text-embeddings-inference reads it.
    rust = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert rust.padding is None
    assert rust.truncation is None
    assert [encoding.ids for encoding in rust.encode_batch(TEXTS)] == expected
    # With the model's config beside it, as sentence-transformers and vLLM do.
    text_config().save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id, stock.padding_side) == (1, 2, 11, "right")
    padded = stock(TEXTS, padding=True)
    assert set(padded) == {"input_ids", "attention_mask"}
    for row, mask, ids in zip(padded["input_ids"], padded["attention_mask"], expected, strict=True):
        assert row[: len(ids)] == ids
        assert set(row[len(ids) :]) <= {11}
        assert mask == [1] * len(ids) + [0] * (len(row) - len(ids))


def test_explicit_add_bos_token_false_does_not_survive_into_the_saved_form(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "source")
    config_path = tmp_path / "source" / "tokenizer_config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "add_bos_token": False}))
    load_tokenizer(tmp_path / "source").save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("word")["input_ids"][0] == 1


def test_roles_missing_from_the_folder_are_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 11
    assert tokenizer.encode(["word"], 8)[0][0] == 1


def test_specials_of_the_folders_own_post_processor_stay(folder: Path) -> None:
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [("[INST]", 3), ("</s>", 2)]
    rust.post_processor = processors.TemplateProcessing(single="[INST] $A </s>", special_tokens=specials)
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>"))
    (row,) = tokenizer.encode(["one two three four five six"], 64)
    assert (row[:2], row[-1]) == ([1, 3], 2)
    assert [row.count(special) for special in (1, 2, 3)] == [1, 1, 1]
    assert tokenizer.encode(["one two three four five six"], 5) == [[*row[:4], 2]]


def test_truncation_keeps_the_first_tokens(tokenizer: TextTokenizer) -> None:
    (full,) = tokenizer.encode([TEXTS[0]], 512)
    assert len(full) > 8
    assert tokenizer.encode([TEXTS[0], ""], 8) == [full[:8], [1]]
    assert tokenizer.encode([TEXTS[0]], len(full)) == [full]
    with pytest.raises(ValueError, match=r"max_tokens: must be > 1 .*, got 1"):
        tokenizer.encode(TEXTS, 1)


def bert_folder(path: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "!"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    tokenizer.save_pretrained(path)
    return tokenizer


def test_bert_folder_keeps_its_own_specials(tmp_path: Path) -> None:
    reference = bert_folder(tmp_path)
    # Such folders ship with truncation and padding switched on.
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(3)
    stored.enable_padding(length=7)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode(["Hello World!", "hello"], 16) == [[2, 5, 6, 7, 8, 3], [2, 5, 3]]
    for max_tokens in (3, 4, 5, 6):
        expected = reference(["Hello World!"], truncation=True, max_length=max_tokens)["input_ids"]
        assert tokenizer.encode(["Hello World!"], max_tokens) == expected
    with pytest.raises(ValueError, match="must be > 2"):
        tokenizer.encode(["Hello"], 2)


def byte_level(**roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a bos token that it does not add, as SmolLM2's: `<|im_start|>` 0, then bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({char: index for index, char in enumerate(["<|im_start|>", *alphabet])}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=rust, **roles)


def test_another_familys_bos_is_not_forced_and_empty_text_is_refused() -> None:
    tokenizer = TextTokenizer(byte_level(bos_token="<|im_start|>", eos_token="<|im_start|>"))
    (row,) = tokenizer.encode(["abc"], 8)
    assert len(row) == 3
    assert 0 not in row
    with pytest.raises(ValueError, match="'' gives no token"):
        tokenizer.encode(["abc", ""], 8)


def test_pad_token_is_eos_or_an_error() -> None:
    assert TextTokenizer(byte_level(eos_token="<|im_start|>")).pad_token_id == 0
    with pytest.raises(LayoutError, match="no pad_token and no eos_token"):
        TextTokenizer(byte_level())


def test_use_of_the_fast_tokenizer_does_not_change_encode(tokenizer: TextTokenizer) -> None:
    expected = tokenizer.encode(TEXTS, 512)
    tokenizer.fast(TEXTS, padding="max_length", truncation=True, max_length=3)
    assert tokenizer.encode(TEXTS, 512) == expected


def test_the_tokenizer_passed_in_is_left_alone(folder: Path) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    fast.backend_tokenizer.post_processor = processors.ByteLevel()
    fast.backend_tokenizer.enable_truncation(2)
    TextTokenizer(fast)
    assert fast.backend_tokenizer.truncation["max_length"] == 2
    assert fast.backend_tokenizer.encode("a").tokens == ["a"]


def test_threads_with_different_limits_do_not_disturb_each_other(tokenizer: TextTokenizer) -> None:
    expected = {limit: tokenizer.encode(TEXTS, limit) for limit in (3, 9, 512)}
    wrong: list[int] = []

    def work(limit: int) -> None:
        wrong.extend(limit for _ in range(100) if tokenizer.encode(TEXTS, limit) != expected[limit])

    threads = [threading.Thread(target=work, args=(limit,)) for limit in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_unencodable_text_is_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"texts\[1\]: character 3 is a lone surrogate"):
        tokenizer.encode(["fine", "bad\ud83d"], 8)
    with pytest.raises(TypeError, match=r"texts\[1\]: must be str, got NoneType"):
        tokenizer.encode(["fine", None], 8)  # type: ignore[list-item]


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: TextTokenizer) -> None:
    check_vocabulary(tokenizer, 8192)
    check_vocabulary(tokenizer, 9000)
    with pytest.raises(LayoutError, match="has 8192 entries, but the model's vocab_size is 8191"):
        check_vocabulary(tokenizer, 8191)


def test_holes_in_the_ids_count_for_the_size(tmp_path: Path) -> None:
    rust = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "z": 40}, unk_token="<unk>"))
    rust.normalizer = normalizers.Lowercase()
    assert TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<unk>")).vocab_size == 41


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model"'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tekken.json", b"{"),
        ("tekken.json", b'{"vocab": []}'),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LayoutError, match=f"^{tmp_path}: no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    text_config().save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)

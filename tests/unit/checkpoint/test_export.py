"""Exported folders, opened by transformers and sentence-transformers, and by the rules of the servers."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    Ministral3Config,
    Ministral3ForSequenceClassification,
    Ministral3Model,
    PreTrainedModel,
)

from ostro.checkpoint.export import verify_export
from ostro.errors import CheckpointError, LayoutError
from ostro.inference.encoder import Encoder
from ostro.models.embedder import Embedder
from ostro.models.tokenizer import TextTokenizer
from tests.helpers.exported import (
    PROMPTS,
    TEXTS,
    VOCAB_SIZE,
    bidirectional,
    export,
    read,
    reference,
    settings,
    stock_mistral,
)
from tests.helpers.tiny import text_config


def test_the_folder_holds_what_consumers_read_and_no_more(folder: Path) -> None:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["embedder"]
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask  # a server under another user can read it


def test_config_is_stock_and_complete(folder: Path) -> None:
    config = read(folder / "config.json")
    expected = {
        "model_type": "ministral3",
        "architectures": ["Ministral3Model"],
        "is_causal": False,
        "use_cache": False,
        "dtype": "float32",
        "pooling": "avg",
        "pad_token_id": 11,
        "vocab_size": VOCAB_SIZE,
        "rope_parameters": text_config().to_dict()["rope_parameters"],
    }
    assert {key: config[key] for key in expected} == expected
    strangers = {"auto_map", "quantization_config", "temperature", "attn_implementation", "_attn_implementation"}
    assert not strangers & set(config)
    assert "is_matryoshka" not in config


def test_pad_token_id_is_the_tokenizers(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    export(bidirectional(pad_token_id=0), tokenizer, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["pad_token_id"] == 11


def test_matryoshka_dims_are_declared(model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path / "out", settings=settings(matryoshka_dims=(8, 16, 32)))
    config = read(tmp_path / "out" / "config.json")
    assert (config["is_matryoshka"], config["matryoshka_dimensions"]) == (True, [8, 16, 32])


def test_weights_have_base_names_and_exact_values(model: PreTrainedModel, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[key], weight) for key, weight in model.state_dict().items())
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight"} < stored.keys()


def test_sharded_bfloat16_export_reloads(model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    export(model, tokenizer, folder, dtype=torch.bfloat16, max_shard_gib=50_000 / 2**30)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight.to(torch.bfloat16)), key
    verify_export(folder, TEXTS, reference(model, tokenizer, TEXTS, settings()))


@pytest.mark.parametrize("make", [bidirectional, stock_mistral])
@pytest.mark.parametrize("pooling", ["avg", "weighted_avg", "cls", "last"])
def test_sentence_transformers_gives_the_same_vectors(
    make: Callable[[], PreTrainedModel], pooling: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model, used = make(), settings(pooling=pooling)
    export(model, tokenizer, tmp_path / "out", settings=used)
    opened = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert opened.max_seq_length == 48
    assert opened.prompts == PROMPTS
    for encode, prompt in ((opened.encode_query, "query: "), (opened.encode_document, "passage: ")):
        vectors = encode(TEXTS, convert_to_tensor=True)
        expected = reference(model, tokenizer, [prompt + text for text in TEXTS], used)
        assert F.cosine_similarity(vectors, expected).min() >= 0.99999
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))
    verify_export(tmp_path / "out", TEXTS, reference(model, tokenizer, TEXTS, used), tolerance=1e-5)


def test_mistral_tower_exports_as_its_stock_class(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    export(stock_mistral(), tokenizer, tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    found = (config["model_type"], config["architectures"], config["is_causal"])
    assert found == ("mistral", ["MistralModel"], False)


def test_unnormalised_vectors_stay_so(model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    used = settings(normalize=False)
    export(model, tokenizer, tmp_path / "out", settings=used)
    expected = reference(model, tokenizer, TEXTS, used)
    vectors = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    verify_export(tmp_path / "out", TEXTS, expected, tolerance=1e-5)
    with pytest.raises(CheckpointError, match="lengths differ"):
        verify_export(tmp_path / "out", TEXTS, F.normalize(expected, dim=-1))


def test_ostro_opens_its_export(model: PreTrainedModel, tokenizer: TextTokenizer, folder: Path) -> None:
    encoder = Encoder.from_pretrained(folder, device="cpu")
    assert (encoder.prompts, encoder.max_tokens, encoder.embedder.pooling) == (PROMPTS, 48, "avg")
    expected = reference(model, tokenizer, ["query: " + text for text in TEXTS], settings())
    assert F.cosine_similarity(encoder.encode_query(TEXTS), expected).min() >= 0.99999
    # A second generation is the same folder.
    again = folder.with_name("again")
    export(Embedder(encoder.embedder.backbone).backbone, encoder.tokenizer, again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert read(again / "config.json") == read(folder / "config.json")


MODES = {"avg": "mean_tokens", "mean": "mean_tokens", "weighted_avg": "weightedmean_tokens", "cls": "cls_token"}


@pytest.mark.parametrize(("pooling", "mode"), [*MODES.items(), ("last", "lasttoken")])
def test_servers_find_the_pooling(
    pooling: str, mode: str, model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    export(model, tokenizer, tmp_path / "out", settings=settings(pooling=pooling))
    modules = read(tmp_path / "out" / "modules.json")
    prefix = "sentence_transformers.models."
    assert [module["type"].removeprefix(prefix) for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all(module["type"].startswith(prefix) for module in modules)
    assert [(module["idx"], module["path"]) for module in modules] == [(0, ""), (1, "1_Pooling"), (2, "2_Normalize")]
    stored = read(tmp_path / "out" / "1_Pooling" / "config.json")
    # vLLM: the first true value names the pooling.
    assert next(key for key, value in stored.items() if value is True) == f"pooling_mode_{mode}"
    # text-embeddings-inference: booleans under the old names, exactly one of them true.
    modes = {key: value for key, value in stored.items() if key.startswith("pooling_mode_")}
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"} < modes.keys()
    assert all(type(value) is bool for value in modes.values())
    assert [key for key, value in modes.items() if value] == [f"pooling_mode_{mode}"]
    assert stored["word_embedding_dimension"] == 32
    # sentence-transformers before 5.4 passes every key to Pooling(...), which knows these only.
    assert stored.keys() - modes.keys() == {"word_embedding_dimension", "include_prompt"}


def test_servers_find_limit_and_prompts(folder: Path) -> None:
    assert read(folder / "sentence_bert_config.json") == {"max_seq_length": 48, "do_lower_case": False}
    about = read(folder / "config_sentence_transformers.json")
    assert about["prompts"] == PROMPTS
    assert about["default_prompt_name"] is None
    assert about["similarity_fn_name"] == "cosine"


def test_an_existing_folder_is_kept(model: PreTrainedModel, tokenizer: TextTokenizer, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds an earlier export; pass overwrite=True"):
        export(model, tokenizer, folder)
    other = folder.with_name("other")
    other.mkdir()
    (other / "thesis.txt").write_text("work of years")
    with pytest.raises(CheckpointError, match="exists already"):
        export(model, tokenizer, other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "work of years"


def test_overwrite_replaces_an_earlier_export(tokenizer: TextTokenizer, folder: Path) -> None:
    (folder / "leftover.bin").write_bytes(b"0")
    newer = bidirectional(seed=1)
    export(newer, tokenizer, folder, overwrite=True)
    assert not (folder / "leftover.bin").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["embedder"]
    verify_export(folder, TEXTS, reference(newer, tokenizer, TEXTS, settings()), tolerance=1e-5)


def test_a_full_disk_leaves_the_earlier_export(
    tokenizer: TextTokenizer, folder: Path, embeddings: torch.Tensor
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            export(bidirectional(seed=1), tokenizer, folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.parent.iterdir()] == ["embedder"]
    verify_export(folder, TEXTS, embeddings, tolerance=1e-5)


@pytest.mark.parametrize("pooling", ["colbert", "multi_vector", "max"])
def test_pooling_that_consumers_lack_is_refused(
    pooling: str, model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"pooling: must be one of avg, mean, .* got '{pooling}'"):
        export(model, tokenizer, tmp_path / "out", settings=settings(pooling=pooling))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 513}, "max_tokens: must be between 2 and the model's 512, got 513"),
        ({"max_tokens": 1}, "max_tokens: must be between 2"),
        ({"matryoshka_dims": (16, 64)}, r"matryoshka_dims: must be between 1 and 32, got \[64\]"),
    ],
)
def test_impossible_settings_are_refused(
    changes: dict[str, Any], message: str, model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(model, tokenizer, tmp_path / "out", settings=settings(**changes))


def test_models_that_are_no_plain_bidirectional_tower_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    config: Ministral3Config = text_config(vocab_size=VOCAB_SIZE)
    with pytest.raises(LayoutError, match="attention is causal"):
        export(Ministral3Model(config), tokenizer, tmp_path / "out")
    config.is_causal = False
    with pytest.raises(LayoutError, match=r"missing \(embed_tokens.weight.*unexpected \(model.embed_tokens.weight"):
        export(Ministral3ForSequenceClassification(config), tokenizer, tmp_path / "out")
    quantised = bidirectional()
    weight = quantised.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(LayoutError, match=r"1 quantised \(layers.0.mlp.up_proj.weight\)"):
        export(quantised, tokenizer, tmp_path / "out")
    with pytest.raises(LayoutError, match="has 1300 entries, but the model's vocab_size is 96"):
        export(Ministral3Model(text_config()), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plain_transformers_needs_only_the_folder(folder: Path) -> None:
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is Ministral3Model
    assert loaded.config.is_causal is False
    assert AutoTokenizer.from_pretrained(folder)("word")["input_ids"][0] == 1

"""Text to token ids, the same in training, in the encoder and in every library that opens an export.

Padding, batching and prompts are left to others. The idea: everything that decides about ids (`<s>` first, for one)
lies in the tokenizer's own post-processor, so that the saved `tokenizer.json` alone reproduces it; truncation and
padding, which the Rust tokenizer keeps as mutable state, are never switched on here.

Which special tokens a text gets:

- A Mistral tokenizer (its bos token is `<s>`) always puts `<s>` first; a stored Tekken file does not say so, and it is
  added where it is missing.
- `</s>` comes last only where the folder's own post-processor adds it. Mistral's do not, and none is added.
- Any other tokenizer follows its own post-processor, which may add nothing.

Texts are parsed for special tokens as transformers does by default: the characters `<s>` in a text become the token.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer
from transformers.utils.hub import cached_file

from ostro.errors import DataError, LayoutError, RecipeError

logger = logging.getLogger(__name__)

MISTRAL_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""Mistral's special tokens by role; its folders often hold the tokens without naming the roles."""

_ROLES = (*MISTRAL_SPECIALS, "cls_token", "sep_token", "mask_token")
_SETTINGS: dict[str, Any] = {
    "padding_side": "right",
    "truncation_side": "right",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
_TEKKEN_FILE = "tekken_240911.json"
_NUM_TEKKEN_SPECIALS = 1000
_NUM_BYTES = 256


class TextTokenizer:
    """A fast tokenizer with settled special tokens and no padding or truncation; safe to call from several threads.

    Attributes:
        vocab_size: Largest id that can come out, plus 1.
        pad_token_id: Id that fills padded batches.
    """

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        """Takes a copy of `fast`, which is left as it is.

        Args:
            fast: Any fast tokenizer of transformers.

        Raises:
            LayoutError: When the tokenizer has no token that could serve as padding.
        """
        self._rust: Tokenizer = copy.deepcopy(fast.backend_tokenizer)
        self._rust.no_padding()
        self._rust.no_truncation()
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        self._roles = _special_roles(fast, self._rust)
        _put_bos_first(self._rust, self._roles.get("bos_token"))
        leading, trailing = _added_tokens(self._rust)
        self._num_special, self._num_trailing = len(leading) + len(trailing), len(trailing)
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_token_id = vocabulary[self._roles["pad_token"]]

    @functools.cached_property
    def fast(self) -> PreTrainedTokenizerFast:
        """A transformers tokenizer with state of its own that gives the same ids: pad token set, right padding."""
        return PreTrainedTokenizerFast(tokenizer_object=self._rust, **self._roles, **_SETTINGS)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of texts, special tokens included.

        Args:
            texts: B texts; an empty one gives its special tokens only.
            max_tokens: Longer texts lose tokens at their end, never special tokens.

        Returns:
            B lists of 1 to `max_tokens` ids.

        Raises:
            ValueError: When `max_tokens` leaves no room for text, or a text gives no token at all.
            DataError: When a text cannot be written as UTF-8 (half of a surrogate pair).
        """
        if max_tokens <= self._num_special:
            raise ValueError(f"max_tokens: must be > {self._num_special} (the special tokens), got {max_tokens}")
        try:
            encodings = self._rust.encode_batch_fast(list(texts))
        except TypeError as error:
            raise _explain(texts, error) from error
        rows = [encoding.ids for encoding in encodings]
        if not all(rows):
            text = texts[[bool(ids) for ids in rows].index(False)]
            raise ValueError(f"texts: {text!r} gives no token, and this tokenizer adds none; leave empty texts out")
        keep = max_tokens - self._num_trailing
        return [ids if len(ids) <= max_tokens else ids[:keep] + ids[len(ids) - self._num_trailing :] for ids in rows]

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which give these ids in every library that reads them.

        Args:
            folder: Made when it does not exist.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        # not the Rust library's own save: a full disk is an OSError here, and there a bare Exception
        (Path(folder) / "tokenizer.json").write_text(self._rust.to_str(pretty=True), encoding="utf-8")
        # The class name that transformers 4 and 5 both know.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._roles, **_SETTINGS}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(name_or_path: str | Path) -> TextTokenizer:
    """Opens the tokenizer of a weights folder or hub repository.

    Args:
        name_or_path: Has `tokenizer.json`, else `tekken.json` (Mistral's own format), else files that `AutoTokenizer`
            makes a fast tokenizer of.

    Returns:
        The tokenizer.

    Raises:
        LayoutError: When there is no tokenizer, it cannot be read, or it has no fast form.
    """
    name = str(name_or_path)
    try:
        if stored := _find(name, "tokenizer.json"):
            # The Rust reader raises a bare Exception on text that is not JSON.
            json.loads(Path(stored).read_text(encoding="utf-8"))
            # Mistral-Small-3.x folders hold a wrong split pattern; transformers recognises them and mends it on demand.
            return TextTokenizer(PreTrainedTokenizerFast.from_pretrained(name, fix_mistral_regex=True))
        if stored := _find(name, "tekken.json"):
            return TextTokenizer(convert_tekken_tokenizer(stored, chat_template=""))
        fast = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise LayoutError(
            f"{name}: no tokenizer that can be read; expected tokenizer.json or tekken.json ({reason})"
        ) from error
    if not isinstance(fast, PreTrainedTokenizerFast):
        kind = type(fast).__name__
        raise LayoutError(f"{name}: {kind} has no fast form, which Ostro needs; convert it to tokenizer.json first")
    return TextTokenizer(fast)


def check_vocabulary(tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Checks that every id the tokenizer can give has a row in the model's embedding.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding; may exceed the tokenizer's size.

    Raises:
        LayoutError: When the tokenizer is larger than the model's vocabulary.
    """
    if tokenizer.vocab_size > vocab_size:
        raise LayoutError(
            f"tokenizer: has {tokenizer.vocab_size} entries, but the model's vocab_size is {vocab_size}; "
            "use the tokenizer the weights were made with"
        )


def cut_tekken(vocab_size: int, folder: Path) -> None:
    """Writes Mistral's Tekken tokenizer cut to its first entries, in Mistral's format and in transformers'.

    Special tokens keep their ids (`<s>` 1, `</s>` 2, `[IMG]` 10, `<pad>` 11), and so does every entry that stays. Text
    that needed a cut entry takes shorter ones, down to bytes: any text can still be encoded.

    Args:
        vocab_size: Entries to keep, the 1000 special ones included.
        folder: Gets `tekken.json`, `tokenizer.json` and `tokenizer_config.json`; made when it does not exist.

    Raises:
        RecipeError: When `vocab_size` leaves out bytes, or exceeds what there is.
    """
    with as_file(files("mistral_common") / "data" / _TEKKEN_FILE) as source:
        tekken = json.loads(source.read_text(encoding="utf-8"))
    config = tekken["config"]
    least, most = _NUM_TEKKEN_SPECIALS + _NUM_BYTES, config["default_vocab_size"]
    if not least <= vocab_size <= most:
        raise RecipeError(
            f"vocab_size: must be between {least} (special tokens and bytes) and {most}, got {vocab_size}"
        )
    tekken["vocab"] = tekken["vocab"][: vocab_size - _NUM_TEKKEN_SPECIALS]
    config["num_vocab_tokens"] = len(tekken["vocab"])
    config["default_vocab_size"] = vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken, separators=(",", ":")), encoding="utf-8")
    TextTokenizer(convert_tekken_tokenizer(str(folder / "tekken.json"), chat_template="")).save(folder)


def _find(name: str, filename: str) -> str | None:
    """Path of a file of a folder or hub repository; None when it has no such file."""
    path: str | None = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def _special_roles(fast: PreTrainedTokenizerFast, rust: Tokenizer) -> dict[str, str]:
    """Token by role: as the tokenizer names them, else Mistral's where the vocabulary has them as special tokens."""
    special = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    named = {role: str(text) for role, text in fast.special_tokens_map.items() if role in _ROLES}
    roles = {role: text for role, text in MISTRAL_SPECIALS.items() if text in special} | named
    if "pad_token" not in roles:
        if "eos_token" not in roles:
            raise LayoutError(
                "tokenizer: has no pad_token and no eos_token to pad with; set one in tokenizer_config.json"
            )
        # Padding is masked everywhere, so any token of the vocabulary serves.
        roles["pad_token"] = roles["eos_token"]
        logger.info("tokenizer: has no pad token; padding with %s", roles["pad_token"])
    return roles


def _put_bos_first(rust: Tokenizer, bos: str | None) -> None:
    """Adds `<s>` in front, unless the tokenizer does it already or is not Mistral's."""
    leading, trailing = _added_tokens(rust)
    if bos != MISTRAL_SPECIALS["bos_token"] or bos in leading[:1]:
        return
    # One template with all of them: a second one after the tokenizer's own would take its parts for a pair of texts.
    first, second = ([bos, *leading, f"${text}", *trailing] for text in "AB")
    special_tokens = [(token, rust.token_to_id(token)) for token in dict.fromkeys((bos, *leading, *trailing))]
    rust.post_processor = processors.TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=special_tokens
    )


def _added_tokens(rust: Tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens put before and after every text."""
    encoding = rust.encode("a")
    tokens = list(zip(encoding.tokens, encoding.special_tokens_mask, strict=True))
    leading = [token for token, _ in itertools.takewhile(lambda item: item[1], tokens)]
    return leading, [token for token, added in tokens[len(leading) :] if added]


def _explain(texts: Sequence[Any], error: TypeError) -> Exception:
    """The error that names the text which the tokenizer refused."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return TypeError(f"texts[{index}]: must be str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            where = f"texts[{index}]: character {problem.start}"
            return DataError(f"{where} is a lone surrogate, which UTF-8 cannot hold; remove it")
    return error

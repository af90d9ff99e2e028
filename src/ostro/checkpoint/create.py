"""Make a weights folder of a random Mistral-3 model, complete and in the form of the releases: `create_weights`.

It stands in for a release where none can be had: tests, demos and benchmarks load it as they would the real one. The
names and shapes are those of transformers' model, built without storage; each tensor is drawn from a seed made of the
given seed and its runtime name, so that a tensor is the same in every layout, precision and sharding."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ostro.checkpoint.presets import LAYOUT_NAMES, PRECISIONS, SIZES, model_config
from ostro.checkpoint.quantization import quantization_config
from ostro.checkpoint.shards import Piece, new_folder, write_shards
from ostro.errors import RecipeError
from ostro.fp8.quantize import quantize
from ostro.models.layout import IDENTITY, NESTED, TEXT_LINEAR, TEXT_ONLY, Layout
from ostro.models.tokenizer import cut_tekken

_LAYOUTS = dict(zip(LAYOUT_NAMES, (NESTED, IDENTITY, TEXT_ONLY), strict=True))
_TEXT_PARTS = ("model.language_model.", "lm_head.")
_EMBEDDING = "model.language_model.embed_tokens.weight"
_NUM_SCALE_BYTES = 4


def create_weights(
    folder: str | Path,
    *,
    size: str,
    layout: str,
    precision: str,
    vocab_size: int,
    seed: int,
    max_shard_gib: float = 4.0,
) -> None:
    """Writes config, weights and tokenizer of a random Mistral-3 model.

    Matrices are normal with deviation 0.02 and norms are 1, as transformers initialises them. As in the releases, a
    nested folder ties the head to the embedding and does not store it, the other layouts store one; FP8 applies to the
    linears of the text layers, the rest is bfloat16.

    Args:
        folder: The folder to make; absent or empty.
        size: A key of `presets.SIZES`.
        layout: `nested` or `identity` (vision-language), or `text-only`.
        precision: `fp8` or `bf16`.
        vocab_size: Entries of the tokenizer, cut from Tekken, and rows of the embedding.
        seed: Of the weights.
        max_shard_gib: Size above which the weights are split into shards; also bounds the memory taken.

    Raises:
        RecipeError: When a preset, layout or precision is unknown, or Tekken cannot be cut to `vocab_size`.
        CheckpointError: When the folder exists and is not empty, or cannot be written.
    """
    _check("size", size, SIZES)
    _check("layout", layout, LAYOUT_NAMES)
    _check("precision", precision, PRECISIONS)
    config = model_config(size, vocab_size=vocab_size, tie_word_embeddings=layout == "nested")
    with new_folder(Path(folder)) as partial:
        cut_tekken(vocab_size, partial)
        stored = _stored_config(config, layout, precision)
        (partial / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pieces = _pieces(config, _LAYOUTS[layout], fp8=precision == "fp8", seed=seed)
        write_shards(partial, pieces, max_shard_gib=max_shard_gib)


def _check(key: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise RecipeError(f"{key}: must be one of {', '.join(valid)}; got {value!r}")


def _stored_config(config: dict[str, Any], layout: str, precision: str) -> dict[str, Any]:
    if layout == "text-only":
        config = {"architectures": ["Ministral3ForCausalLM"], "dtype": config["dtype"], **config["text_config"]}
    return {**config, "quantization_config": quantization_config("static")} if precision == "fp8" else config


def _pieces(config: dict[str, Any], layout: Layout, *, fp8: bool, seed: int) -> list[Piece]:
    """One piece per parameter of the model, in the model's order."""
    settings = Mistral3Config(**config)
    with torch.device("meta"):
        parameters = Mistral3ForConditionalGeneration(settings).state_dict()
    pieces = []
    for name, parameter in parameters.items():
        if (name == "lm_head.weight" and settings.tie_word_embeddings) or (
            layout is TEXT_ONLY and not name.startswith(_TEXT_PARTS)
        ):
            continue
        key = layout.to_stored(name)
        draw = functools.partial(_draw, name, parameter.shape, settings, seed)
        if fp8 and TEXT_LINEAR.fullmatch(name):
            pieces.append(Piece(parameter.numel() + 2 * _NUM_SCALE_BYTES, functools.partial(_make_fp8, key, draw)))
        else:
            pieces.append(Piece(parameter.numel() * torch.bfloat16.itemsize, functools.partial(_make_bf16, key, draw)))
    return pieces


def _draw(name: str, shape: torch.Size, settings: Mistral3Config, seed: int) -> torch.Tensor:
    """The float32 values of a parameter, as `PreTrainedModel._init_weights` of transformers distributes them."""
    if len(shape) == 1:  # the norms: the family has no biases
        return torch.ones(shape)
    text = settings.get_text_config()
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(shape).normal_(0.0, text.initializer_range, generator=generator)
    if name == _EMBEDDING:
        values[text.pad_token_id] = 0.0
    return values


def _make_bf16(key: str, draw: functools.partial[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {key: draw().bfloat16()}


def _make_fp8(key: str, draw: functools.partial[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    weight, scale = quantize(draw())
    # 1.0 is exact for activations up to 448; nothing has been measured that a better one could come from
    return {key: weight, f"{key}_scale_inv": scale, f"{key.removesuffix('weight')}activation_scale": torch.tensor(1.0)}

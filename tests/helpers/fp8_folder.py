"""FP8 weights folders with the values they stand for, written from the format's description, not by Ostro's writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tests.helpers.tiny import vlm_config

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn value."""

PREFIXES = {
    "nested": {"model.language_model.": "language_model.model.", "model.": "", "lm_head.": "language_model.lm_head."},
    "identity": {},
    "text_only": {"model.language_model.": "model."},
}
"""Runtime prefix to stored prefix, per layout; the first that matches counts."""


def write_fp8_folder(
    folder: Path,
    *,
    layout: str = "nested",
    tie_word_embeddings: bool = True,
    config: Mistral3Config | None = None,
    scale_shape: tuple[int, ...] | str = (),
    scale_dtype: torch.dtype = torch.float32,
    fp8: bool = True,
    num_shards: int = 1,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Writes a tiny Mistral-3 checkpoint whose text linears are float8_e4m3fn with scales.

    Args:
        folder: Made when it does not exist.
        layout: A key of `PREFIXES`; `text_only` leaves out vision tower and projector.
        tie_word_embeddings: Whether the head is the embedding, and so absent from the files.
        config: Outer config; a tiny one when None.
        scale_shape: Shape of `weight_scale_inv`: `()` as released, or `(1,)`; or `row`, `column of rows` and `block`
            for `(out,)`, `(out, 1)` and a grid of 4 x 2 blocks.
        scale_dtype: Its type.
        fp8: False leaves all weights bfloat16, without scales.
        num_shards: Files to spread the tensors over; a weight and its scale may land in different ones.
        seed: Of the weights.

    Returns:
        The text tower's exact bfloat16 values by bare key (`layers.0...`).
    """
    config = config or vlm_config(tie_word_embeddings=tie_word_embeddings)
    torch.manual_seed(seed)
    weights = Mistral3ForConditionalGeneration(config).to(torch.bfloat16).state_dict()
    stored: dict[str, torch.Tensor] = {}
    truth: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        in_tower = key.startswith("model.language_model.")
        if (layout == "text_only" and not in_tower and key != "lm_head.weight") or (
            key == "lm_head.weight" and tie_word_embeddings
        ):
            continue
        name = stored_name(key, layout)
        if fp8 and in_tower and "_proj." in key:
            stored[name], scale, weight = quantised(weight, scale_shape, scale_dtype)
            stored[name + "_scale_inv"] = scale
            stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
        else:
            stored[name] = weight.clone()
        if in_tower:
            truth[key.removeprefix("model.language_model.")] = weight
    save_shards(folder, stored, num_shards)
    write_config(folder, config, layout, fp8=fp8)
    return truth


def quantised(
    weight: torch.Tensor, scale_shape: tuple[int, ...] | str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight `[out, in]` as FP8, its scale, and the bfloat16 values that the two stand for."""
    rows, columns = {"row": (len(weight), 1), "column of rows": (len(weight), 1), "block": (4, 2)}.get(
        str(scale_shape), (1, 1)
    )
    height, width = weight.shape[0] // rows, weight.shape[1] // columns
    largest = weight.float().abs().view(rows, height, columns, width).amax((1, 3))
    scale = (largest / FP8_MAX).clamp_min(1e-6).to(scale_dtype)
    full = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    stored = (weight.float() / full).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    values = (stored.float() * full).to(torch.bfloat16)
    if scale_shape == "row":
        return stored, scale.view(-1), values
    return stored, scale if isinstance(scale_shape, str) else scale.reshape(scale_shape), values


def stored_name(key: str, layout: str) -> str:
    """The key on disk of a runtime parameter name."""
    for runtime, on_disk in PREFIXES[layout].items():
        if key.startswith(runtime):
            return on_disk + key.removeprefix(runtime)
    return key


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    """Writes `model.safetensors`, or `num_shards` files and their index, the keys dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::num_shards]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites `model.safetensors` after `change` was applied to its tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_config(folder: Path, config: Mistral3Config, layout: str, *, fp8: bool = True) -> None:
    """Writes `config.json`, with the FP8 marker where released folders carry it: at the top level."""
    architecture, source = "Mistral3ForConditionalGeneration", config.to_dict()
    if layout == "text_only":
        architecture, source = "Ministral3ForCausalLM", config.text_config.to_dict()
        source["tie_word_embeddings"] = config.tie_word_embeddings
    source |= {"architectures": [architecture], "dtype": "bfloat16"}
    if fp8:
        source["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        }
    (folder / "config.json").write_text(json.dumps(source, indent=2))

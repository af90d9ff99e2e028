"""A vision-language model back into a folder like the one it came from, in bfloat16 or FP8: `export_vlm`, `verify_vlm`.

How tensors are named and quantised is left to the model's state-dict adapter, which remembers the source folder: its
layout, which weights were FP8, and their scales. The idea: everything that is not weights is copied from the source
folder, and the weights are converted one shard at a time, so no second copy of the model is ever held. A weight that
training left as it was comes back byte for byte.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ostro.checkpoint.files import read_json
from ostro.checkpoint.fill import read_into
from ostro.checkpoint.quantization import quantization_config
from ostro.checkpoint.reader import Fp8StorageReader
from ostro.checkpoint.shards import Piece, replace_folder, write_shards
from ostro.errors import CheckpointError, shorten
from ostro.models.folder import PARAMS_NAME
from ostro.models.fp8_adapter import Mistral3FP8StateDictAdapter
from ostro.models.layout import NATIVE
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration

MARKER = "ostro_export.json"
"""File that says a folder was written by `export_vlm`; only such a folder is overwritten."""

# Copied where the source has them: tokenizer, template, image processing, generation defaults.
_COPIED = (
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "SYSTEM_PROMPT.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Half a unit in the last place of an FP8 value: as a share of a normal one, with room for the rounding to bfloat16,
# and in units of the scale for the smallest ones.
_FP8_RELATIVE, _FP8_ABSOLUTE = 2.0**-4 + 2.0**-8, 2.0**-10


def export_vlm(
    model: Mistral3FP8VLMForConditionalGeneration,
    source: Path,
    folder: Path,
    *,
    precision: Literal["source", "bf16", "fp8"] = "source",
    num_steps: int | None = None,
    max_shard_gib: float = 4.0,
) -> None:
    """Writes config, weights and tokenizer; the folder appears whole or not at all.

    Args:
        model: Loaded from `source`, on any device.
        source: The weights folder it came from.
        folder: To be made; an earlier export there is replaced once the new one is whole.
        precision: `fp8` quantises the weights that are FP8 in the source (for a BF16 source, the linears that its
            family's releases quantise) with one scale of the source's form each; `bf16` rounds all; `source` is as the
            source is.
        num_steps: Optimizer steps of the training, for the marker file.
        max_shard_gib: Size above which the weights are split, in GiB; also bounds the memory taken.

    Raises:
        CheckpointError: When the folder is in the way or cannot be written.
        LayoutError: When the source folder is not readable.
    """
    settings = _read_settings(model, source)
    fp8 = precision == "fp8" or (precision == "source" and settings.quantization_key in settings.content)
    if fp8:
        settings.content.setdefault(settings.quantization_key, settings.fp8)
    else:
        settings.content.pop(settings.quantization_key, None)
    adapter = _export_adapter(model, fp8=fp8)
    pieces = []
    for name, weight in _weights(model).items():
        convert = functools.partial(adapter.convert_single_tensor_to_hf, name, weight, quantization=fp8)
        pieces.append(Piece(weight.numel() * torch.bfloat16.itemsize, functools.partial(_on_cpu, convert)))
    with replace_folder(folder.absolute(), _is_export, overwrite=True) as new:
        write_shards(new, pieces, max_shard_gib=max_shard_gib, stem=settings.stem)
        text = json.dumps(settings.content, indent=2, sort_keys=True) + "\n"
        (new / settings.name).write_text(text, encoding="utf-8")
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
        about = {"source": str(source), "precision": "fp8" if fp8 else "bf16", "num_steps": num_steps}
        (new / MARKER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def verify_vlm(folder: Path, model: Mistral3FP8VLMForConditionalGeneration) -> None:
    """Reads an exported folder back, one weight at a time, and compares it with the model.

    BF16 weights must be equal bit by bit; FP8 ones within half a unit of FP8's last place, and what that place is for
    the smallest values.

    Args:
        folder: The export.
        model: What was exported, on any device.

    Raises:
        CheckpointError: When a weight is missing, unexpected, or another one.
    """
    reader = Fp8StorageReader(folder, head_dim=model.state_dict_adapter.head_dim)
    wanted = _weights(model)
    if wrong := wanted.keys() ^ reader.shapes.keys():
        raise CheckpointError(
            f"{folder}: missing or unexpected weights: {shorten(sorted(wrong))}; do not use this export"
        )
    for name, weight in wanted.items():
        stored = torch.empty(weight.shape, dtype=torch.bfloat16)
        read_into(reader, {name: stored})
        weight = weight.detach().cpu()
        if name not in reader.keys.scales:
            same = torch.equal(stored, weight.to(torch.bfloat16))
        else:
            allowed = weight.float().abs() * _FP8_RELATIVE + reader.scale(name).float().max() * _FP8_ABSOLUTE
            same = bool(((stored.float() - weight.float()).abs() <= allowed).all())
        if not same:
            raise CheckpointError(f"{folder}: {name} is not the model's; do not use this export")


def _is_export(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _weights(model: Mistral3FP8VLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Every stored weight by runtime name: a tied head is its embedding, and not stored."""
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _on_cpu(convert: functools.partial[list[tuple[str, torch.Tensor]]]) -> Mapping[str, torch.Tensor]:
    return {key: tensor.cpu().contiguous() for key, tensor in convert()}


@dataclass(frozen=True)
class _Settings:
    """The configuration of a folder: which file says how the weights are stored, and in which words.

    Attributes:
        name: `config.json`, or `params.json` in Mistral's native layout.
        content: As in the source.
        stem: What the names of its weights files begin with.
        quantization_key: Of what says that weights are FP8.
        fp8: What it says where the source does not: without static activation scales, which such a source lacks.
    """

    name: str
    content: dict[str, Any]
    stem: str
    quantization_key: str
    fp8: Mapping[str, Any]


def _read_settings(model: Mistral3FP8VLMForConditionalGeneration, source: Path) -> _Settings:
    if model.state_dict_adapter.layout is NATIVE:
        fp8: dict[str, Any] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
        return _Settings(PARAMS_NAME, read_json(source / PARAMS_NAME), "consolidated", "quantization", fp8)
    fp8 = quantization_config("dynamic")
    return _Settings("config.json", read_json(source / "config.json"), "model", "quantization_config", fp8)


def _export_adapter(model: Mistral3FP8VLMForConditionalGeneration, *, fp8: bool) -> Mistral3FP8StateDictAdapter:
    """The model's own adapter; for a BF16 source to be quantised, one that takes the linears of the text layers."""
    own = model.state_dict_adapter
    if own.scales or not fp8:
        return own
    quantised = copy.deepcopy(model.config)
    quantised.quantization_config = quantization_config("dynamic")
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full(quantised)
    adapter.layout, adapter.is_tied = own.layout, own.is_tied
    return adapter

"""The text tower of an embedder from its folder, streamed: `fill_encoder(tower, folder)`.

The tower is made by `ostro.models.backbone.empty_encoder_backbone` and split by `ostro.parallel.apply`; tensors are
read by `reader`. The idea is that of `load`, for folders of every form that `build_encoder_backbone` takes: the names
of the files lead to those of `Mistral3ForConditionalGeneration`, of which the tower's are a part, whatever else is
stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Mistral3Config, PreTrainedModel

from ostro.checkpoint.files import read_json
from ostro.checkpoint.fill import check_fit, read_into
from ostro.checkpoint.reader import Fp8StorageReader
from ostro.errors import LayoutError, shorten
from ostro.models.backbone import LEFTOVERS
from ostro.models.layout import BARE
from ostro.models.rope import rebuild_all_rotary

logger = logging.getLogger(__name__)

_TOWER = "model.language_model."


def fill_encoder(
    tower: PreTrainedModel,
    folder: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Gives a text tower on the meta device its storage, and its weights the values of a folder.

    The values are those of `build_encoder_backbone(folder, "embedding", dtype=dtype)`.

    Args:
        tower: Split or not, or a stage of it; its weights are of `dtype` or a wider type.
        folder: One that `check_weights_folder` has passed; None leaves the weights as whatever was in memory.
        shapes: Of the weights of the whole tower, by name.
        dtype: What values are rounded to.
        device: Where the tower goes.

    Raises:
        LayoutError: When keys, shapes or scales of the folder are not the tower's; nothing was read then.
        CheckpointError: When a file cannot be read, or holds infinite or nan values.

    Distributed: no collectives. Every rank reads all headers and scales, and of the weights the rows it owns.
    """
    reader = None if folder is None else _open(folder, shapes, dtype)
    tower.to_empty(device=device)
    if reader is not None:
        read_into(reader, {BARE.to_runtime(name): weight for name, weight in tower.state_dict().items()})
        logger.info("%s: %s layout, text tower read as %s", folder, reader.keys.layout.name, dtype)
    rebuild_all_rotary(tower)


def _open(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Fp8StorageReader:
    """Compares names and shapes of files and tower, before any storage is made."""
    fields = read_json(folder / "config.json")
    is_quantized = fields.get("quantization_config") is not None
    # as everywhere, FP8 weights are the bfloat16 values that they stand for, also in a wider type
    reader = Fp8StorageReader(folder, dtype=torch.bfloat16 if is_quantized else dtype)
    source = f"{folder} ({reader.keys.layout.name} layout)"
    if reader.keys.scales and not is_quantized:
        raise LayoutError(
            f"{source}: {len(reader.keys.scales)} unexpected scales of FP8 weights "
            f"({shorten(reader.keys.scales.values())}), as config.json has no quantization_config; restore it"
        )
    is_vlm = fields.get("model_type") == Mistral3Config.model_type
    found = [
        name
        for name, key in reader.keys.weights.items()
        if not LEFTOVERS.search(key) and (name.startswith(_TOWER) or not is_vlm)
    ]
    wanted = {BARE.to_runtime(name): shape for name, shape in shapes.items()}
    check_fit(source, reader, wanted, found)
    return reader

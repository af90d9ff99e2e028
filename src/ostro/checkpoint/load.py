"""A vision-language model from its folder, streamed: `load_vlm(folder)`.

How tensors are read is left to `reader`, which modules are split over ranks to `ostro.parallel.apply`. The order of
the steps matters and is the same for one process and for many: the model is built on the meta device, without storage;
it is sharded; what this rank owns gets storage; names and shapes are compared before anything is read; the rows this
rank owns are read into place; head and embedding are tied again, since storage was handed out one by one; and rotary
frequencies, which no file has, are computed. No process ever holds more than its own parameters and a few MiB.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, GenerationConfig, Mistral3Config, PreTrainedConfig

from ostro.checkpoint.files import is_native, read_json, weight_files
from ostro.checkpoint.fill import check_fit, read_into
from ostro.checkpoint.native import config_of_params
from ostro.checkpoint.positions import stale_rope
from ostro.checkpoint.reader import Fp8StorageReader
from ostro.errors import LayoutError
from ostro.models.folder import PARAMS_NAME
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.rope import rebuild_all_rotary
from ostro.parallel.apply import shard_parameters

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def load_vlm(
    path: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    shard: Callable[[Mistral3FP8VLMForConditionalGeneration], object] | None = None,
    skip: Callable[[str], bool] | None = None,
) -> Mistral3FP8VLMForConditionalGeneration:
    """Loads a Mistral-3 vision-language model, in evaluation mode.

    FP8 weights become the values they stand for, `(weight.float() * scale.float()).to(dtype)`; all others are cast.
    Infinite and nan values are refused, as is any tensor missing, left over or of another shape.

    Args:
        path: Folder in the nested, identity or native layout, FP8 or not.
        mesh: Ranks to split the parameters over, 1-D: `Shard(0)` of every parameter. None is one process, or whatever
            `shard` does.
        dtype: Of the parameters: bfloat16, float32 or float16; what their values are rounded to where `shard` gives
            them a wider type. Rotary frequencies are float32 in any case.
        device: Where the parameters go; the mesh's device, else the CPU, when None.
        shard: Applied to the model on the meta device in place of the default for `mesh`. It may take out parts, whose
            weights are then not read.
        skip: Tells by runtime name which weights are not read: a checkpoint will fill them in.

    Returns:
        The model. Its `state_dict_adapter` is bound to the folder: layout, FP8 weights, their scales as stored, and the
        activation scales. Its config is a copy without `quantization_config`.

    Raises:
        LayoutError: When the folder is not of such a model, or its files, keys, shapes or scales contradict each other
            or `config.json`.
        CheckpointError: When a file is missing, truncated, damaged or not finite.

    Distributed: no collectives. Every rank reads all headers and scales, and of the weights the rows it owns.
    """
    folder = Path(path)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    weight_files(folder)  # names what is absent, before anything is built
    config = read_vlm_config(folder)
    with torch.device("meta"):
        model: Mistral3FP8VLMForConditionalGeneration = Mistral3FP8VLMForConditionalGeneration._from_config(
            config, dtype=dtype
        )
    reader = Fp8StorageReader(folder, dtype=dtype, head_dim=model.state_dict_adapter.head_dim)
    is_tied = bool(config.tie_word_embeddings)
    _check_keys(folder, reader, model, is_tied)
    if shard is not None:
        shard(model)
    elif mesh is not None:
        shard_parameters(model, mesh)
    model.to_empty(device=_device(device, mesh))
    has_both = {_HEAD, _EMBEDDING} <= model.state_dict().keys()
    if is_tied and has_both:
        model.tie_weights()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not (is_tied and name == _HEAD)}
    read_into(reader, {name: tensor for name, tensor in wanted.items() if skip is None or not skip(name)})
    if has_both and (model.lm_head.weight is model.get_input_embeddings().weight) != is_tied:
        raise LayoutError(f"{folder}: head and embedding must {'' if is_tied else 'not '}be one after loading")
    num_rotary = rebuild_all_rotary(model)
    model.state_dict_adapter = model.state_dict_adapter.bound(
        layout=reader.keys.layout,
        scales=reader.scales(),
        activation_scales=reader.activation_scales(),
        is_tied=is_tied,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    logger.info(
        "%s: %s layout, %d weights (%d FP8) read as %s, %d rotary modules rebuilt",
        folder,
        reader.keys.layout.name,
        len(reader.keys.weights),
        len(reader.keys.scales),
        dtype,
        num_rotary,
    )
    model.eval()
    return model


def read_vlm_config(folder: Path) -> Mistral3Config:
    """The configuration of a vision-language folder: `config.json`, or `params.json` where the folder is native.

    Where both are there and give different attention scalings, a warning names both.

    Args:
        folder: An existing folder.

    Raises:
        LayoutError: When it cannot be read, is not of a vision-language model, or lacks `llama_4_scaling_beta`.
    """
    if is_native(folder):
        fields = config_of_params(read_json(folder / PARAMS_NAME), folder / PARAMS_NAME)
        source = folder / PARAMS_NAME
    else:
        source = folder / "config.json"
        fields = read_json(source)
    model_type = fields.get("model_type")
    if model_type != Mistral3Config.model_type:
        raise LayoutError(
            f"{source}: model_type must be {Mistral3Config.model_type!r}, a vision-language model, got {model_type!r}; "
            "a text model is loaded by ostro.models.backbone.build_encoder_backbone"
        )
    text = fields.get("text_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if text.get("model_type") == "ministral3" and "llama_4_scaling_beta" not in rope:
        raise LayoutError(
            f"{source}: has no text_config.rope_parameters.llama_4_scaling_beta, which the attention needs; add it, "
            "from llama_4_scaling.beta of the release's params.json (0.1 for Ministral-3), or 0 for a model without"
        )
    if contradiction := stale_rope(folder, text):
        logger.warning("%s: %s", source, contradiction)
    return _build_config(source, fields)


def _build_config(source: Path, fields: Mapping[str, Any]) -> Mistral3Config:
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**copy.deepcopy(dict(fields)))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise LayoutError(f"{source}: not a configuration that transformers understands: {reason}") from error
    if not isinstance(config, Mistral3Config):
        raise LayoutError(f"{source}: expected a Mistral3Config, got {type(config).__name__}")
    return config


def _check_keys(
    folder: Path, reader: Fp8StorageReader, model: Mistral3FP8VLMForConditionalGeneration, is_tied: bool
) -> None:
    """Compares names and shapes of files and model, before any storage is made."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source = f"{folder} ({reader.keys.layout.name} layout)"
    if is_tied and _HEAD in reader.shapes:
        raise LayoutError(
            f"{source}: tie_word_embeddings is true, but a head is stored ({reader.keys.weights[_HEAD]}); set it to "
            "false if head and embedding differ, else leave the head out of the files"
        )
    if not is_tied and _HEAD not in reader.shapes:
        raise LayoutError(
            f"{source}: tie_word_embeddings is false, but no head is stored; set it to true if the head is the "
            "embedding (its default for Mistral3Config), else download the missing file"
        )
    if is_tied:
        del wanted[_HEAD]
    check_fit(source, reader, wanted, reader.shapes)


def _device(device: torch.device | str | None, mesh: DeviceMesh | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if mesh is None or mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())

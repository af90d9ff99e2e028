"""Any checkpoint of the Mistral-3 family as the backbone of an encoder: `build_encoder_backbone(folder, "embedding")`.

Pooling and normalisation are left to `embedder`, tokens to `tokenizer`. The idea: transformers reads the folder as what
it is, and its report of missing and unexpected keys decides whether that went well; FP8 weights are dequantised on the
way, to the bfloat16 values they stand for. Then the text tower's tensors are handed, without a copy, to a fresh model
of the class that was asked for, which knows nothing of the folder's quantisation and key names: a model that still
carries those is written to disk wrongly by `save_pretrained`.
"""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    Ministral3ForSequenceClassification,
    Mistral3Config,
    Mistral3Model,
    MistralForSequenceClassification,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from ostro.errors import CheckpointError, LayoutError, is_out_of_memory, shorten
from ostro.models.folder import check_weights_folder, is_local
from ostro.models.ministral_bidirectional import Ministral3BidirectionalModel
from ostro.models.pooling import check_pool_type, pool

logger = logging.getLogger(__name__)

MODEL_CLASSES: dict[str, dict[str, type[PreTrainedModel]]] = {
    "embedding": {
        "ministral3": Ministral3BidirectionalModel,
        "ministral3_bidirec": Ministral3BidirectionalModel,
        "mistral": MistralModel,
    },
    "score": {
        "ministral3": Ministral3ForSequenceClassification,
        "ministral3_bidirec": Ministral3ForSequenceClassification,
        "mistral": MistralForSequenceClassification,
    },
}
"""Class of the backbone by task and by `model_type` of the text tower."""

_HEAD = "score.weight"
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
LEFTOVERS = re.compile(r"(^|\.)(lm_head\.weight|activation_scale|rotary_emb\.inv_freq)$")
"""Keys beyond the tower: the language-model head, the static activation scales, which only FP8 inference uses, and
frequencies, which are computed."""


def build_encoder_backbone(
    model_name_or_path: str,
    task: str,
    *,
    pooling: str | None = None,
    temperature: float | None = None,
    extract_submodel: str | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Loads the text tower of a Mistral-3 checkpoint for an encoder task, in evaluation mode.

    `embedding` gives a `Ministral3BidirectionalModel`, `score` a `Ministral3ForSequenceClassification`. For a `mistral`
    tower (Mistral-Small-3.x) they give transformers' `MistralModel` with `is_causal` False, and
    `MistralForSequenceClassification`.

    Args:
        model_name_or_path: Weights folder (text-only or vision-language, bfloat16 or FP8) or hub id.
        task: `embedding` or `score`.
        pooling: Written to the config of an embedding backbone; what the folder says, else `avg`, when None.
        temperature: Likewise, else 1.0; the config of a `mistral` tower has no place for it.
        extract_submodel: Dotted path of the text tower in a vision-language model, and only there; `language_model`
            when None.
        num_labels: Outputs of a `score` head; what a classifier folder says, else 1, when None.
        trust_remote_code: Handed to transformers.
        **hf_kwargs: Handed to `from_pretrained`: `dtype`, `attn_implementation`, `device_map`, `revision`, `token` and
            so on. FP8 weights are rounded to bfloat16 in every `dtype`.

    Returns:
        The backbone; an embedding backbone was probed to be bidirectional. A `score` head that the folder lacks is new
        (normal with the config's `initializer_range`, from torch's global generator), and a log line says so.

    Raises:
        ValueError: For an unknown task or pooling, an option of the other task, or an `extract_submodel` that is not a
            model with a `.config`.
        LayoutError: When the folder is of another family or layout, or its keys or shapes are not the model's.
        CheckpointError: When the folder does not exist or a file in it cannot be read.
    """
    _check_options(task, pooling, temperature, num_labels)
    if is_local(model_name_or_path):
        check_weights_folder(Path(model_name_or_path, hf_kwargs.get("subfolder", "")))
    hub_options = {key: hf_kwargs[key] for key in _HUB_OPTIONS if key in hf_kwargs}
    source = read_config(model_name_or_path, trust_remote_code=trust_remote_code, **hub_options)
    path, tower_config = _text_tower(model_name_or_path, source, extract_submodel)
    model_class = _model_class(f"{model_name_or_path}: {path or 'config.json'}", task, tower_config)
    config = _target_config(model_name_or_path, tower_config, model_class, pooling, temperature, num_labels)
    config.name_or_path = model_name_or_path

    quantization = _dequantizing(model_name_or_path, source)
    dtype = hf_kwargs.pop("dtype", "auto")
    # FP8: asked for float32, transformers leaves dequantised weights bfloat16 among float32 ones; so cast after reading
    options = {**hf_kwargs, "trust_remote_code": trust_remote_code, "dtype": torch.bfloat16 if quantization else dtype}
    if path:
        weights = _load_weights(Mistral3Model, model_name_or_path, _quantized(source, quantization), path, options)
        prefix = f"{model_class.base_model_prefix}." if task == "score" else ""
        weights = {prefix + key: weight for key, weight in weights.items()}
    else:
        weights = _load_weights(model_class, model_name_or_path, _quantized(config, quantization), "", options)
    if quantization and dtype != "auto":
        _cast(weights, dtype)
    model = _assemble(model_class, config, weights, hf_kwargs.get("attn_implementation"))
    if task == "embedding":
        check_bidirectional(model)
    return model


def empty_encoder_backbone(
    model_name_or_path: str, *, pooling: str, extract_submodel: str | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The backbone that `build_encoder_backbone` gives for `embedding`, on the meta device, without weights.

    It may be split before it gets storage, which `ostro.checkpoint.load_encoder.fill_encoder` gives it. It is not
    probed: that would need weights, and all ranks.

    Args:
        model_name_or_path: As there; its configuration is read and its weights are not.
        pooling: As there, and so `extract_submodel`.
        extract_submodel: Dotted path of the text tower.
        dtype: Of the weights.

    Raises:
        ValueError: As there, and so the others.
        LayoutError: When the folder is of another family.
        CheckpointError: When there is no configuration.
    """
    source = read_config(model_name_or_path)
    _dequantizing(model_name_or_path, source)
    path, tower_config = _text_tower(model_name_or_path, source, extract_submodel)
    model_class = _model_class(f"{model_name_or_path}: {path or 'config.json'}", "embedding", tower_config)
    config = _target_config(model_name_or_path, tower_config, model_class, pooling, None, None)
    config.name_or_path = model_name_or_path
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    _set_direction(model)
    model.eval()
    return model


@torch.no_grad()
def check_bidirectional(model: PreTrainedModel) -> None:
    """Probes that the first position sees the last token: without padding, with padding on the right, and on the left.

    Args:
        model: A text tower, on any device.

    Raises:
        LayoutError: When a change of the last token leaves the first position's hidden state as it was.
    """
    token = model.config.vocab_size // 2
    texts = torch.tensor([[token, token + 1, token + 2], [token, token + 1, token + 3]], device=model.device)
    training = model.training
    model.eval()
    for case, pad in {"no padding": (0, 0), "right padding": (0, 1), "left padding": (1, 0)}.items():
        mask = F.pad(torch.ones_like(texts[:1]), pad)
        # one text per call: rows of one batch may take different kernels, and then differ without seeing the last token
        before, after = (
            pool(model(input_ids=F.pad(text[None], pad), attention_mask=mask, use_cache=False)[0], mask, "cls")
            for text in texts
        )
        # a causal model gives equal bits; the bound leaves room for kernels that add in no fixed order
        if (before - after).abs().max() <= 1e-5 * before.abs().max():
            raise LayoutError(
                f"{type(model).__name__}: attention is causal, expected bidirectional ({case}: changing the last token "
                "leaves the first as it was); set is_causal to false in config.json"
            )
    model.train(training)


def _check_options(task: str, pooling: str | None, temperature: float | None, num_labels: int | None) -> None:
    """Raises ValueError for an unknown task or pooling and for options that the task does not have."""
    if task not in MODEL_CLASSES:
        raise ValueError(f"task: must be one of {', '.join(MODEL_CLASSES)}, got {task!r}")
    if task == "embedding" and num_labels is not None:
        raise ValueError(f"num_labels: only for task 'score', got {num_labels} for 'embedding'")
    if task == "score" and (pooling is not None or temperature is not None):
        raise ValueError(f"pooling, temperature: only for task 'embedding', got {pooling!r}, {temperature!r}")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    if pooling is not None:
        check_pool_type(pooling)


def read_config(name: str, **options: Any) -> PreTrainedConfig:
    """The configuration of a folder or hub id.

    Args:
        name: Folder or hub id.
        **options: Handed to transformers: `revision`, `token` and so on.

    Raises:
        CheckpointError: When there is none.
        LayoutError: When transformers does not understand it.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        raise CheckpointError(f"{name}: no config.json can be read there or on the hub: {_one_line(error)}") from error
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise LayoutError(
            f"{name}: config.json is not one that transformers understands: {_one_line(error)}"
        ) from error
    return config


def _one_line(error: BaseException) -> str:
    """The message of another library's error, which may be indented text of several lines."""
    return " ".join(str(error).split())


def _text_tower(name: str, source: PreTrainedConfig, extract_submodel: str | None) -> tuple[str, PreTrainedConfig]:
    """Dotted path and config of the text tower in a vision-language model; the whole, at path "", for a text model."""
    if not isinstance(source, Mistral3Config):
        if extract_submodel is not None:
            raise LayoutError(
                f"{name}: is text-only (model_type {source.model_type!r}) and has no part {extract_submodel!r}; leave "
                f"extract_submodel out, or give a vision-language folder (model_type {Mistral3Config.model_type!r})"
            )
        return "", source
    path = extract_submodel or "language_model"
    with torch.device("meta"):
        module: torch.nn.Module = Mistral3Model(source)
    for part in path.split("."):
        parts = dict(module.named_children())
        if part not in parts:
            owner = f"{type(module).__name__}, which has {', '.join(parts) or 'none'}"
            raise ValueError(f"extract_submodel: {path!r}: no part {part!r} in {owner}")
        module = parts[part]
    if not isinstance(module, PreTrainedModel):
        found = f"a {type(module).__name__} without a .config"
        raise ValueError(f"extract_submodel: {path!r} is {found}, expected a whole model such as language_model")
    return path, module.config


def _model_class(where: str, task: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class for a task and a text tower's config."""
    classes = MODEL_CLASSES[task]
    if config.model_type not in classes:
        known = ", ".join((*classes, Mistral3Config.model_type))
        raise LayoutError(f"{where}: model_type must be one of {known}, got {config.model_type!r}")
    return classes[config.model_type]


def _target_config(
    name: str,
    source: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    pooling: str | None,
    temperature: float | None,
    num_labels: int | None,
) -> PreTrainedConfig:
    """The configuration of `model_class` with what `source` says and what was asked for."""
    fields = source.to_dict()
    dropped = {"model_type", "architectures", "auto_map", "quantization_config"}
    if model_class in MODEL_CLASSES["embedding"].values():
        if temperature is not None:
            if model_class is MistralModel:
                raise ValueError(f"temperature: the config of a mistral tower has no place for it, got {temperature}")
            fields["temperature"] = temperature
        # use_cache: an encoder reads a text once, and the keys and values of a large batch take much memory
        fields |= {"is_causal": False, "use_cache": False, "pooling": pooling or fields.get("pooling", "avg")}
        try:
            check_pool_type(fields["pooling"])
        except ValueError as error:
            raise LayoutError(f"{name}: config.json: {error}") from error
    else:
        dropped |= {"pooling", "temperature"}
        is_classifier = any(name.endswith("ForSequenceClassification") for name in source.architectures or ())
        if num_labels is not None or not is_classifier:
            dropped |= {"id2label", "label2id"}
            fields["num_labels"] = 1 if num_labels is None else num_labels
    config_class: type[PreTrainedConfig] = model_class.config_class  # type: ignore[assignment]
    return config_class(**{key: value for key, value in fields.items() if key not in dropped})


def _dequantizing(name: str, source: PreTrainedConfig) -> dict[str, Any] | None:
    """The folder's FP8 configuration, set to dequantise while reading; None for a folder that is not quantised."""
    quantization: dict[str, Any] | None = source.to_dict().get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method != "fp8":
        raise LayoutError(f"{name}: quantization_config.quant_method must be 'fp8' or absent, got {method!r}")
    return {**quantization, "dequantize": True}


def _quantized(config: PreTrainedConfig, quantization: dict[str, Any] | None) -> PreTrainedConfig:
    """A copy of `config` that tells transformers how the folder is quantised."""
    config = copy.deepcopy(config)
    if quantization:
        config.quantization_config = quantization
    return config


def _load_weights(
    model_class: type[PreTrainedModel],
    name: str,
    config: PreTrainedConfig,
    path: str,
    options: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Weights of the part at `path` (the whole model for ""), without a head that the folder lacks."""
    try:
        loaded: Any = model_class.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{name}: transformers cannot read the weights: {_one_line(error)}") from error
    model, info = loaded
    weights: dict[str, torch.Tensor] = model.get_submodule(path).state_dict()
    inside = f"{path}." if path else ""
    shapes = {key: f"{key} {list(stored)} for {list(wanted)}" for key, stored, wanted in info["mismatched_keys"]}
    problems = {
        "missing": [key for key in info["missing_keys"] if key.startswith(inside) and key != _HEAD],
        "unexpected": [key for key in info["unexpected_keys"] if not LEFTOVERS.search(key)],
        "of another shape": [shape for key, shape in shapes.items() if key.startswith(inside)],
        "FP8 without scale": [key for key, weight in weights.items() if weight.dtype == torch.float8_e4m3fn],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {kind} ({shorten(keys)})" for kind, keys in problems.items() if keys)
        raise LayoutError(f"{name}: weights do not fit {type(model).__name__}: {found}; do they belong to config.json?")
    return {key: weight for key, weight in weights.items() if key not in info["missing_keys"]}


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype | str) -> None:
    """Casts the weights in place of the old ones, one at a time, so that there are never two full copies."""
    for key in weights:
        weights[key] = weights[key].to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _assemble(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    attn_implementation: str | None,
) -> PreTrainedModel:
    """A fresh model around `weights`, whose memory it shares; a `score` head that they lack is made."""
    with torch.device("meta"):
        model = model_class(config)
    like = next(iter(weights.values()))
    if _HEAD in model.state_dict() and _HEAD not in weights:
        logger.warning("%s: has no %s; the head is new and needs training", config.name_or_path, _HEAD)
        weights = {**weights, _HEAD: like.new_empty(model.get_parameter(_HEAD).shape)}
        weights[_HEAD].normal_(std=config.initializer_range)
    model.load_state_dict(weights, assign=True)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    _set_direction(model)
    tower: Any = model.base_model
    # rotary buffers are in no checkpoint; made anew they are float32, as a bfloat16 frequency turns far positions wrong
    tower.rotary_emb = type(tower.rotary_emb)(config).to(like.device)
    config.dtype = like.dtype
    model.eval()
    return model


def _set_direction(model: PreTrainedModel) -> None:
    """Tells every layer what the config says: attention functions look at either."""
    tower: Any = model.base_model
    for layer in tower.layers:
        layer.self_attn.is_causal = model.config.to_dict().get("is_causal", True)

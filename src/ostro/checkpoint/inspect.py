"""Tell what a weights folder holds and what is wrong with it, without reading a tensor: `inspect_folder(folder)`.

Judging what was found is left to `problems`, rendering to the command line.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro.checkpoint.files import StoredTensor, is_native, read_headers, read_json
from ostro.checkpoint.native import config_of_params
from ostro.checkpoint.positions import rope_report
from ostro.checkpoint.problems import FP8, find_problems, is_scale
from ostro.checkpoint.report import FolderReport, Fp8Report, MemoryReport, TokenizerReport
from ostro.errors import LayoutError
from ostro.models.folder import PARAMS_NAME
from ostro.models.layout import ACTIVATION_SCALE, SCALE, Layout, recognise

_PARTS = {
    "text": "model.language_model.",
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "head": "lm_head.",
    "score head": "score.",
}
"""Parts of a model by prefix of their runtime names."""

_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer_config.json", "tokenizer.model")


def inspect_folder(folder: str | Path) -> FolderReport:
    """Reads configuration, safetensors headers and tokenizer files of a weights folder.

    Args:
        folder: Any folder of the family: FP8 or BF16, text or vision-language, in Hugging Face or native layout, or an
            exported embedder.

    Returns:
        The report.

    Raises:
        LayoutError: When the configuration or the weights are absent, or a JSON file is unreadable.
        CheckpointError: When the folder does not exist or a weights file is missing, truncated, damaged or unreadable.
    """
    folder = Path(folder)
    tensors = read_headers(folder)
    config = _read_config(folder)
    text = config.get("text_config", config)
    layout, layout_problem = _recognise(tensors)
    model_type = config.get("model_type", "unknown")
    bytes_by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        bytes_by_dtype[tensor.dtype] += tensor.num_bytes
    report = FolderReport(
        folder=folder,
        model_type=model_type,
        text_model_type=text.get("model_type", "unknown"),
        architectures=tuple(config.get("architectures") or ()),
        layout=layout.name if layout else None,
        num_files=len({tensor.file for tensor in tensors}),
        num_tensors=dict(Counter(tensor.dtype for tensor in tensors)),
        num_bytes=dict(bytes_by_dtype),
        num_parameters=_count_parameters(tensors, layout),
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
        fp8=_fp8(tensors, layout),
        # transformers' defaults: Mistral3Config ties, Ministral3Config does not
        tied_in_config=config.get("tie_word_embeddings", model_type == "mistral3"),
        head_stored=any(name.endswith("lm_head.weight") for name in _by_name(tensors, layout)),
        vocab_size=text.get("vocab_size"),
        rope=rope_report(text),
        is_causal=text.get("is_causal", text.get("model_type") != "ministral3_bidirec"),
        pooling=text.get("pooling"),
        tokenizer=_tokenizer(folder),
        memory=_memory(tensors),
        problems=layout_problem,
    )
    return dataclasses.replace(report, problems=(*report.problems, *find_problems(report, tensors, layout, config)))


def _recognise(tensors: Sequence[StoredTensor]) -> tuple[Layout | None, tuple[str, ...]]:
    try:
        return recognise(tensor.key for tensor in tensors), ()
    except LayoutError as error:
        return None, (str(error),)


def _read_config(folder: Path) -> dict[str, Any]:
    if is_native(folder):
        return config_of_params(read_json(folder / PARAMS_NAME), folder / PARAMS_NAME)
    return read_json(folder / "config.json")


def _by_name(tensors: Sequence[StoredTensor], layout: Layout | None) -> dict[str, StoredTensor]:
    """Tensors by runtime name, without those that are no part of the model; by stored key where there is no layout."""
    if layout is None:
        return {tensor.key: tensor for tensor in tensors}
    return {layout.to_runtime(tensor.key): tensor for tensor in tensors if not layout.skips(tensor.key)}


def _memory(tensors: Sequence[StoredTensor]) -> MemoryReport:
    weights = [tensor for tensor in tensors if not is_scale(tensor.key)]
    num_fp8 = sum(tensor.num_elements for tensor in weights if tensor.dtype == FP8)
    num_parameters = sum(tensor.num_elements for tensor in weights)
    return MemoryReport(num_parameters=num_parameters, num_fp8_parameters=num_fp8)


def _count_parameters(tensors: Sequence[StoredTensor], layout: Layout | None) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, tensor in _by_name(tensors, layout).items():
        if not is_scale(name):
            part = next((part for part, prefix in _PARTS.items() if layout and name.startswith(prefix)), "unknown")
            counts[part] += tensor.num_elements
    return dict(counts)


def _fp8(tensors: Sequence[StoredTensor], layout: Layout | None) -> Fp8Report:
    named = _by_name(tensors, layout)
    scale_of = {name: f"{name.removesuffix('weight')}{SCALE}" for name, tensor in named.items() if tensor.dtype == FP8}
    found = [scale for scale in scale_of.values() if scale in named]
    return Fp8Report(
        num_weights=len(scale_of),
        num_scales=len(found),
        scale_dtypes=tuple(sorted({named[scale].dtype for scale in found})),
        missing_scales=tuple(named[name].key for name, scale in scale_of.items() if scale not in named),
        unknown_scales=tuple(
            tensor.key
            for name, tensor in named.items()
            if is_scale(name) and name.rpartition(".")[2] not in (SCALE, ACTIVATION_SCALE)
        ),
    )


def _tokenizer(folder: Path) -> TokenizerReport:
    files = tuple(name for name in _TOKENIZER_FILES if (folder / name).is_file())
    stored = next((folder / name for name in files if name in _VOCAB_READERS), None)
    if stored is None:
        return TokenizerReport(files, None)
    content = read_json(stored)
    try:
        return TokenizerReport(files, _VOCAB_READERS[stored.name](content))
    except (KeyError, TypeError, AttributeError) as error:
        raise LayoutError(f"{stored}: not a {stored.name} ({error!r}); restore or download the file again") from error


def _vocab_of_tokenizer_json(content: Mapping[str, Any]) -> int:
    vocab = content["model"]["vocab"]  # id by token, or for Unigram models a list
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max((*ids, *(token["id"] for token in content.get("added_tokens") or ())), default=-1)


def _vocab_of_tekken(content: Mapping[str, Any]) -> int:
    return int(content["config"]["default_vocab_size"])


_VOCAB_READERS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "tokenizer.json": _vocab_of_tokenizer_json,
    "tekken.json": _vocab_of_tekken,
}

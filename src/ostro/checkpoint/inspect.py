"""Tell what a weights folder holds and what is wrong with it, without reading a tensor: `inspect_folder(folder)`.

Judging what was found is left to `problems`, rendering to the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro.checkpoint.files import StoredTensor, read_headers, read_json
from ostro.checkpoint.layout import Layout, recognise
from ostro.checkpoint.problems import ACTIVATION_SCALE, FP8, SCALE, find_problems, is_scale
from ostro.checkpoint.report import FolderReport, Fp8Report, RopeReport, TokenizerReport
from ostro.errors import LayoutError

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
        folder: Any folder of the family in Hugging Face layout: FP8 or BF16, text or vision-language, or an exported
            embedder.

    Returns:
        The report.

    Raises:
        LayoutError: When `config.json` or the weights are absent, there in Mistral's native layout only, or a JSON file
            is unreadable.
        CheckpointError: When the folder does not exist or a weights file is missing, truncated or unreadable.
    """
    folder = Path(folder)
    tensors = read_headers(folder)
    config = read_json(folder / "config.json")
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
        fp8=_fp8(tensors),
        # transformers' defaults: Mistral3Config ties, Ministral3Config does not
        tied_in_config=config.get("tie_word_embeddings", model_type == "mistral3"),
        head_stored=any(tensor.key.endswith("lm_head.weight") for tensor in tensors),
        vocab_size=text.get("vocab_size"),
        rope=_rope(text),
        is_causal=text.get("is_causal", text.get("model_type") != "ministral3_bidirec"),
        pooling=text.get("pooling"),
        tokenizer=_tokenizer(folder),
        problems=layout_problem,
    )
    return dataclasses.replace(report, problems=(*report.problems, *find_problems(report, tensors, layout, config)))


def _recognise(tensors: Sequence[StoredTensor]) -> tuple[Layout | None, tuple[str, ...]]:
    try:
        return recognise(tensor.key for tensor in tensors), ()
    except LayoutError as error:
        return None, (str(error),)


def _count_parameters(tensors: Sequence[StoredTensor], layout: Layout | None) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if not is_scale(tensor.key):
            name = layout.to_runtime(tensor.key) if layout else ""
            counts[next((part for part, prefix in _PARTS.items() if name.startswith(prefix)), "unknown")] += (
                tensor.num_elements
            )
    return dict(counts)


def _fp8(tensors: Sequence[StoredTensor]) -> Fp8Report:
    dtypes = {tensor.key: tensor.dtype for tensor in tensors}
    scale_of = {key: key.removesuffix("weight") + SCALE for key, dtype in dtypes.items() if dtype == FP8}
    found = [scale for scale in scale_of.values() if scale in dtypes]
    return Fp8Report(
        num_weights=len(scale_of),
        num_scales=len(found),
        scale_dtypes=tuple(sorted({dtypes[scale] for scale in found})),
        missing_scales=tuple(key for key, scale in scale_of.items() if scale not in dtypes),
        unknown_scales=tuple(
            key for key in dtypes if is_scale(key) and key.rpartition(".")[2] not in (SCALE, ACTIVATION_SCALE)
        ),
    )


def _rope(text: Mapping[str, Any]) -> RopeReport:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return RopeReport(
        kind=kind,
        theta=rope.get("rope_theta", text.get("rope_theta")),
        factor=rope.get("factor"),
        original_tokens=rope.get("original_max_position_embeddings"),
        max_tokens=text.get("max_position_embeddings"),
        attention_scaling=_yarn_scaling(rope) if kind == "yarn" else 1.0,
        llama_4_scaling_beta=rope.get("llama_4_scaling_beta"),
    )


def _yarn_scaling(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by.

    Source: Peng et al. 2023 (arXiv:2309.00071), section 3.4; with both mscales, `_compute_yarn_parameters` of
        transformers.
    """
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    growth = 0.1 * math.log(max(rope.get("factor") or 1.0, 1.0))
    if mscale and mscale_all_dim:
        return float((growth * mscale + 1.0) / (growth * mscale_all_dim + 1.0))
    return growth + 1.0


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

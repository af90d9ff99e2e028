"""What is wrong with a weights folder: where configuration, headers and tokenizer contradict each other.

The idea: most folders that train or serve wrongly without any error are ones where two of them disagree, so every
disagreement becomes a sentence that says what each side claims and what would come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ostro.checkpoint.files import StoredTensor
from ostro.checkpoint.positions import stale_rope
from ostro.checkpoint.report import FolderReport
from ostro.errors import shorten
from ostro.models.layout import SCALE, TEXT_LINEAR, Layout

FP8 = "F8_E4M3"
"""An FP8 weight's type in the words of safetensors."""
_TOWER = "model.language_model."


def is_scale(key: str) -> bool:
    """Whether a name is that of a quantisation scale, known or not, rather than of a parameter.

    Args:
        key: As in the files, or of the model.
    """
    return "scale" in key.rpartition(".")[2]


def find_problems(
    report: FolderReport, tensors: Sequence[StoredTensor], layout: Layout | None, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """The contradictions of a folder.

    Args:
        report: What was found so far.
        tensors: All of the folder.
        layout: Its key layout; None skips what needs one.
        config: `config.json`.

    Returns:
        One sentence each, the graver kind first.
    """
    by_name = {}
    if layout:
        by_name = {layout.to_runtime(tensor.key): tensor for tensor in tensors if not layout.skips(tensor.key)}
    return (
        *_precision_problems(report, tensors, by_name),
        *_shape_problems(report, by_name, config.get("text_config", config)),
        *_head_problems(report),
        *_rope_problems(report, config.get("text_config", config)),
        *_embedder_problems(report),
    )


def _precision_problems(
    report: FolderReport, tensors: Sequence[StoredTensor], by_name: Mapping[str, StoredTensor]
) -> Iterator[str]:
    fp8, named = report.fp8, by_name or {tensor.key: tensor for tensor in tensors}
    if fp8.missing_scales:
        yield f"FP8 weights without {SCALE}, their real values are unknown: {shorten(fp8.missing_scales)}"
    if fp8.unknown_scales:
        yield f"scales of an unknown name, which readers pass over; expected {SCALE}: {shorten(fp8.unknown_scales)}"
    scales = {name: f"{name.removesuffix(SCALE)}weight" for name in named if name.endswith(f".{SCALE}")}
    if unscaled := [
        named[weight].key if weight in named else named[scale].key
        for scale, weight in scales.items()
        if weight not in named or named[weight].dtype != FP8
    ]:
        yield f"scales of weights that are not stored as FP8, so perhaps applied already: {shorten(unscaled)}"
    if fp8.num_weights and report.quantization != "fp8":
        yield (
            f"{fp8.num_weights} FP8 weights, but quantization_config.quant_method of config.json is "
            f"{report.quantization!r} instead of 'fp8': transformers would load them without their scales"
        )
    if report.quantization == "fp8" and not fp8.num_weights:
        yield "quantization_config.quant_method of config.json is 'fp8', but no weight is stored as FP8"
    if strange := [name for name, tensor in by_name.items() if tensor.dtype == FP8 and not TEXT_LINEAR.fullmatch(name)]:
        yield f"FP8 outside the linears of the text layers: {shorten(strange)}"


def _shape_problems(
    report: FolderReport, by_name: Mapping[str, StoredTensor], text: Mapping[str, Any]
) -> Iterator[str]:
    vocab_size, num_ids = report.vocab_size, report.tokenizer.vocab_size
    embedding = by_name.get(f"{_TOWER}embed_tokens.weight")
    if embedding and vocab_size and embedding.shape[0] != vocab_size:
        yield f"config.json has vocab_size {vocab_size}, but the stored embedding has {embedding.shape[0]} rows"
    if vocab_size and num_ids and num_ids > vocab_size:
        yield f"the tokenizer has {num_ids} ids, more than the vocab_size {vocab_size} of config.json"
    prefix = f"{_TOWER}layers."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in by_name if name.startswith(prefix)}
    if by_name and "num_hidden_layers" in text and len(layers) != text["num_hidden_layers"]:
        yield f"config.json has num_hidden_layers {text['num_hidden_layers']}, but {len(layers)} text layers are stored"


def _head_problems(report: FolderReport) -> Iterator[str]:
    generates = any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in report.architectures)
    if generates and not report.tied_in_config and not report.head_stored:
        yield "no head is stored, and tie_word_embeddings of config.json is false: the head would be random"
    if generates and report.tied_in_config and report.head_stored:
        yield "a head is stored, but tie_word_embeddings of config.json is true; set it to false if the two differ"


def _rope_problems(report: FolderReport, text: Mapping[str, Any]) -> Iterator[str]:
    if report.text_model_type.startswith("ministral3") and report.rope.llama_4_scaling_beta is None:
        yield "config.json has no rope_parameters.llama_4_scaling_beta, which transformers' attention needs; 0 is none"
    if contradiction := stale_rope(report.folder, text):
        yield contradiction


def _embedder_problems(report: FolderReport) -> Iterator[str]:
    if (report.folder / "modules.json").is_file() and report.is_causal:
        yield "a sentence-transformers folder with causal attention; config.json needs is_causal false if trained so"

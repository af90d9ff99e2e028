"""What is told about a weights folder: plain frozen records, filled by `inspect` and rendered by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fp8Report:
    """FP8 weights and their scales.

    Attributes:
        num_weights: Tensors of type F8_E4M3.
        num_scales: Those whose `weight_scale_inv` is there.
        scale_dtypes: Types of the scales found.
        missing_scales: Keys of FP8 weights without one.
        unknown_scales: Keys that name a scale in a way the family does not, such as `weight_scale`.
    """

    num_weights: int
    num_scales: int
    scale_dtypes: tuple[str, ...]
    missing_scales: tuple[str, ...]
    unknown_scales: tuple[str, ...]


@dataclass(frozen=True)
class RopeReport:
    """Positions, from the text tower's configuration; None where it says nothing.

    Attributes:
        kind: `yarn`, `default` and so on.
        theta: Base period.
        factor: Context extension.
        original_tokens: Context length before the extension.
        max_tokens: Context length.
        attention_scaling: What cosine and sine are multiplied by.
        llama_4_scaling_beta: Growth of queries with position; 0 is none.
    """

    kind: str
    theta: float | None
    factor: float | None
    original_tokens: int | None
    max_tokens: int | None
    attention_scaling: float
    llama_4_scaling_beta: float | None


@dataclass(frozen=True)
class TokenizerReport:
    """The tokenizer's files.

    Attributes:
        files: Names of those that are there.
        vocab_size: Largest id plus 1; None when neither `tokenizer.json` nor `tekken.json` is there.
    """

    files: tuple[str, ...]
    vocab_size: int | None


@dataclass(frozen=True)
class FolderReport:
    """What `inspect_folder` found.

    Attributes:
        folder: The folder.
        model_type: Of `config.json`.
        text_model_type: Of the text tower's part of it; equal to `model_type` for a text model.
        architectures: Of `config.json`.
        layout: Name of the key layout; None when no layout covers all keys, which is then a problem.
        num_files: Weights files.
        num_tensors: Tensors by stored type, such as `BF16`.
        num_bytes: Their bytes by stored type.
        num_parameters: Parameters by part (text, vision, projector, head, score head), scales not counted; everything
            under `unknown` without a layout.
        quantization: `quant_method` of the configuration; None for plain weights.
        fp8: FP8 weights and scales.
        tied_in_config: Whether the configuration says that the head is the embedding.
        head_stored: Whether the files hold a language-model head.
        vocab_size: Of the configuration.
        rope: Positions.
        is_causal: Whether the configuration asks for causal attention.
        pooling: Of the configuration of an embedder, else None.
        tokenizer: Tokenizer files.
        problems: What contradicts or would be loaded wrongly, one sentence each.
    """

    folder: Path
    model_type: str
    text_model_type: str
    architectures: tuple[str, ...]
    layout: str | None
    num_files: int
    num_tensors: Mapping[str, int]
    num_bytes: Mapping[str, int]
    num_parameters: Mapping[str, int]
    quantization: str | None
    fp8: Fp8Report
    tied_in_config: bool
    head_stored: bool
    vocab_size: int | None
    rope: RopeReport
    is_causal: bool
    pooling: str | None
    tokenizer: TokenizerReport
    problems: tuple[str, ...]

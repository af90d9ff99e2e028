"""What is told about a weights folder: plain frozen records, filled by `inspect` and rendered by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ostro.checkpoint.positions import RopeReport


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
class TokenizerReport:
    """The tokenizer's files.

    Attributes:
        files: Names of those that are there.
        vocab_size: Largest id plus 1; None when neither `tokenizer.json` nor `tekken.json` is there.
    """

    files: tuple[str, ...]
    vocab_size: int | None


@dataclass(frozen=True)
class MemoryReport:
    """What a model needs over all ranks, in bytes, before activations; a rank needs its share where it is split evenly.

    Attributes:
        num_parameters: All parameters.
        num_fp8_parameters: Those stored as FP8.
    """

    num_parameters: int
    num_fp8_parameters: int

    @property
    def bfloat16_bytes(self) -> int:
        """Every parameter dequantised to bfloat16, frozen: 2 bytes each."""
        return 2 * self.num_parameters

    @property
    def fp8_bytes(self) -> int:
        """A frozen base as stored: 1 byte for each FP8 parameter, 2 for each other."""
        return 2 * self.num_parameters - self.num_fp8_parameters

    @property
    def full_float32_bytes(self) -> int:
        """Training everything with float32 weights, gradients and moments: 16 bytes a parameter."""
        return 16 * self.num_parameters


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
        memory: What the model needs.
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
    memory: MemoryReport
    problems: tuple[str, ...]

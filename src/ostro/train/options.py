"""Options of the training loops: model, optimizer, schedule, run. Ranges and defaults live here only."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from ostro.config import Options, PathField
from ostro.retrieval.options import EvaluateOptions


class ModelOptions(Options):
    """Which weights are trained, and in which precision."""

    weights: PathField
    """Weights folder or hub id of any Mistral-3 checkpoint."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights and activations in forward and backward; the optimizer always works in float32."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the norms and the MLP of every layer (torch.compile): a slow first step, then faster ones."""


class EmbedModelOptions(ModelOptions):
    """The text tower of a checkpoint as an encoder."""

    extract_submodel: str | None = None
    """Dotted path of the part to take, such as `language_model`; found by itself for a Mistral-3 vision-language
    folder."""
    pooling: Literal["avg", "weighted_avg", "cls", "last"] = "avg"
    """How token states become one vector."""


Part = Literal["vision", "projector", "embeddings", "language_model", "head"]
"""Named parts of a vision-language model; with tied weights the head belongs to the embeddings."""


class VlmModelOptions(ModelOptions):
    """A vision-language model, and which parts of it are trained."""

    weights: PathField
    """Weights folder of any Mistral-3 vision-language checkpoint, FP8 or BF16."""
    freeze: tuple[Part, ...] = ()
    """Parts that keep their weights."""


class OptimizerOptions(Options):
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: float = pydantic.Field(2e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = pydantic.Field(0.01, ge=0)
    """Decoupled weight decay of matrices; vectors (norms) and the temperature have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = pydantic.Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float | None = pydantic.Field(1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; null for no limit."""


class VlmOptimizerOptions(OptimizerOptions):
    """AdamW, with a peak learning rate per part where one is wanted."""

    part_learning_rates: dict[Part, pydantic.PositiveFloat] = {}
    """Peak learning rate by part; parts not named take `learning_rate`."""


class ScheduleOptions(Options):
    """Learning rate over the run: linear warm-up, then a decay to `final_ratio` of the peak."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Form of the decay."""
    warmup_steps: int = pydantic.Field(100, ge=0)
    """Optimizer steps from 0 to the peak."""
    final_ratio: float = pydantic.Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""


class TrainOptions(Options):
    """Length of the run and what happens on the way; periods count optimizer steps."""

    num_steps: int | None = pydantic.Field(None, ge=1)
    """Optimizer steps of the run; give this or `num_epochs`."""
    num_epochs: float | None = pydantic.Field(None, gt=0)
    """Passes over the training queries; give this or `num_steps`."""
    log_every: int = pydantic.Field(10, ge=1)
    """Steps between log lines and metric rows."""
    evaluate_every: int | None = pydantic.Field(None, ge=1)
    """Steps between evaluations; null evaluates only before and after the run."""
    save_every: int | None = pydantic.Field(None, ge=1)
    """Steps between checkpoints; null saves at the end and when stopped."""
    keep_last: int = pydantic.Field(2, ge=1)
    """Checkpoints kept."""
    keep_best: bool = False
    """Also save after the evaluation with the best first metric so far, and keep that checkpoint besides."""
    async_save: bool = True
    """Write checkpoints while training goes on; false spares the host memory of a second state, 12 bytes per trained
    parameter."""

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        return self


class EmbedTrainOptions(TrainOptions):
    """Length of an embedding run and what happens on the way."""

    accumulation_steps: int = pydantic.Field(1, ge=1)
    """Contrastive batches per optimizer step; negatives are shared within a batch, not across."""


class WeightsPresetOptions(Options):
    """Random weights made before the run where `model.weights` does not exist; the keys are those of `ostro init`."""

    size: str = "tiny"
    """Size preset."""
    layout: Literal["nested", "identity", "text-only"] = "nested"
    """Key layout of the folder."""
    precision: Literal["fp8", "bf16"] = "fp8"
    """Stored precision of the text layers."""
    vocab_size: int = pydantic.Field(8192, ge=1256)
    """Entries of the tokenizer cut from Tekken."""


class PrepareOptions(Options):
    """Inputs a demo makes for itself, once, where they are missing."""

    weights: WeightsPresetOptions | None = None
    """Random weights for `model.weights`."""


class EmbedPrepareOptions(PrepareOptions):
    """Inputs of the embedding demo."""

    dataset: Literal["attack"] | None = None
    """Data set written to the folder of the first training source."""


class VlmPrepareOptions(PrepareOptions):
    """Inputs of the vision-language demo."""

    dataset: Literal["fashion"] | None = None
    """Data set written to the folder that holds the file of the first training source."""


class AnswerOptions(Options):
    """Held-out conversations whose last answers the model gives itself: loss, and exact match per kind of question."""

    path: PathField
    """Conversations, in the forms of the training data."""
    max_samples: int | None = pydantic.Field(None, ge=1)
    """Use a fixed random draw of this many conversations; null takes all."""
    max_new_tokens: int = pydantic.Field(32, ge=1)
    """Tokens of an answer, at most."""
    batch_samples: int = pydantic.Field(64, ge=1)
    """Conversations answered at once; bounds memory, changes no answer beyond rounding."""


class FinalEvaluateOptions(EvaluateOptions):
    """The held-out set that a run is judged by."""

    bm25: bool = True
    """Score BM25 on the same queries, as a yardstick (extra `search`)."""


class VlmExportOptions(Options):
    """The folder written at the end of a run."""

    precision: Literal["source", "bf16", "fp8"] = "source"
    """Stored precision of the weights that were FP8 in the source; `source` is fp8 for an FP8 folder, else bf16."""


class ExportOptions(Options):
    """The folder written at the end of a run."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Stored precision."""
    max_tokens: int | None = pydantic.Field(None, ge=8)
    """Token limit that the exported folder states; null takes the larger of the two training limits."""


class TrackOptions(Options):
    """Where metrics go besides `metrics.jsonl`."""

    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers to write to; each needs its package (extra `track`)."""
    project: str = "ostro"
    """Project name for wandb and trackio."""

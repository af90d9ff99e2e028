"""The recipes a run can be started from: each composes the options that the rooms define next to their code.

It holds no settings of its own beyond seed and output, only the checks that need two blocks at once.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from ostro.config import Options, PathField
from ostro.data.conversation_options import ConversationDataOptions
from ostro.data.options import DataOptions
from ostro.losses.options import ContrastiveOptions
from ostro.parallel.options import ParallelOptions
from ostro.retrieval.options import EvaluateOptions
from ostro.train.options import (
    AnswerOptions,
    EmbedModelOptions,
    EmbedPrepareOptions,
    EmbedTrainOptions,
    ExportOptions,
    FinalEvaluateOptions,
    OptimizerOptions,
    ScheduleOptions,
    TrackOptions,
    TrainOptions,
    VlmExportOptions,
    VlmModelOptions,
    VlmOptimizerOptions,
    VlmPrepareOptions,
)


class Recipe(Options):
    """What recipes of every kind have in common."""

    @classmethod
    def expand(cls, data: dict[str, Any]) -> None:
        """A path as `data.train` stands for a single source with every default."""
        block = data.get("data")
        if isinstance(block, dict) and isinstance(block.get("train"), str):
            block["train"] = [{"path": block["train"]}]


class EmbedRecipe(Recipe):
    """Train an embedder for search: `ostro train`."""

    kind: Literal["embed"]
    """What is trained."""
    seed: int = pydantic.Field(17, ge=0, lt=2**31)
    """Decides data order, sampled positives and negatives, dropout and new weights."""
    output: PathField
    """Run folder: checkpoints, metrics, report and the exported weights."""
    prepare: EmbedPrepareOptions = EmbedPrepareOptions()
    """Inputs made by the run itself where missing (demos)."""
    model: EmbedModelOptions
    """Weights to start from."""
    data: DataOptions
    """Training sources and batches."""
    loss: ContrastiveOptions = ContrastiveOptions()
    """Contrastive loss."""
    optimizer: OptimizerOptions = OptimizerOptions()
    """AdamW."""
    schedule: ScheduleOptions = ScheduleOptions()
    """Learning rate over the run."""
    train: EmbedTrainOptions
    """Length of the run and its periods."""
    evaluate: EvaluateOptions | None = None
    """Held-out set searched during the run."""
    test: FinalEvaluateOptions | None = None
    """Held-out set searched with the untrained and the final weights, beside BM25."""
    parallel: ParallelOptions = ParallelOptions()
    """How the ranks share the work; may change when a run goes on."""
    export: ExportOptions = ExportOptions()
    """The folder written at the end."""
    track: TrackOptions = TrackOptions()
    """Trackers besides `metrics.jsonl`."""

    @property
    def max_tokens(self) -> int:
        """Token limit of the trained model, for evaluation and export."""
        return self.export.max_tokens or max(self.data.query_max_tokens, self.data.document_max_tokens)

    @pydantic.model_validator(mode="after")
    def _blocks_agree(self) -> Self:
        if self.train.evaluate_every is not None and self.evaluate is None:
            raise ValueError("train.evaluate_every: is set, but there is no evaluate block; add one or leave it out")
        if self.prepare.dataset is not None and len(self.data.train) != 1:
            raise ValueError("prepare.dataset: needs exactly one source in data.train, the folder to write to")
        if self.parallel.tp_vision:
            raise ValueError("parallel.tp_vision: an embedder has no vision tower; leave it out")
        if not self.parallel.shard_frozen:
            raise ValueError("parallel.shard_frozen: nothing of an embedder is frozen; leave it out")
        return self


class VlmRecipe(Recipe):
    """Fine-tune a vision-language model on conversations with images: `ostro train`."""

    kind: Literal["vlm"]
    """What is trained."""
    seed: int = pydantic.Field(17, ge=0, lt=2**31)
    """Decides data order and new weights."""
    output: PathField
    """Run folder: checkpoints, metrics, report and the exported weights."""
    prepare: VlmPrepareOptions = VlmPrepareOptions()
    """Inputs made by the run itself where missing (demos)."""
    model: VlmModelOptions
    """Weights to start from, and what of them is trained."""
    data: ConversationDataOptions
    """Training sources and batches."""
    optimizer: VlmOptimizerOptions = VlmOptimizerOptions()
    """AdamW."""
    schedule: ScheduleOptions = ScheduleOptions()
    """Learning rate over the run."""
    train: TrainOptions
    """Length of the run and its periods."""
    evaluate: AnswerOptions | None = None
    """Held-out conversations answered during the run."""
    test: AnswerOptions | None = None
    """Held-out conversations answered with the untrained and the final weights."""
    parallel: ParallelOptions = ParallelOptions()
    """How the ranks share the work; may change when a run goes on."""
    export: VlmExportOptions = VlmExportOptions()
    """The folder written at the end."""
    track: TrackOptions = TrackOptions()
    """Trackers besides `metrics.jsonl`."""

    @pydantic.model_validator(mode="after")
    def _blocks_agree(self) -> Self:
        if self.train.evaluate_every is not None and self.evaluate is None:
            raise ValueError("train.evaluate_every: is set, but there is no evaluate block; add one or leave it out")
        if self.prepare.dataset is not None and len(self.data.train) != 1:
            raise ValueError("prepare.dataset: needs exactly one source in data.train, the file to write")
        frozen = sorted(set(self.optimizer.part_learning_rates) & set(self.model.freeze))
        if frozen:
            raise ValueError(f"optimizer.part_learning_rates.{frozen[0]}: this part is in model.freeze; take one out")
        if not self.parallel.shard_frozen and not self.model.freeze:
            raise ValueError(
                "parallel.shard_frozen: is false, but model.freeze names no part; name one, or leave it out"
            )
        return self


KINDS: dict[str, type[EmbedRecipe] | type[VlmRecipe]] = {"embed": EmbedRecipe, "vlm": VlmRecipe}

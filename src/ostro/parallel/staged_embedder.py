"""An embedder in a pipeline: its vectors, and their gradients, through stages of which each rank holds some.

The loss is left to the caller, who has all vectors on every rank. The idea is that of the cached form of a contrastive
step (`ostro.losses.cached`): vectors are made once without a graph, and once more when the gradient of each is known,
now by the schedule of a pipeline, to which the product of vectors and gradients is the loss of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ostro.errors import RecipeError
from ostro.models.embedder import Embedder
from ostro.models.packed import PackedTexts, fill_to, forward_packed, packed_rows
from ostro.models.pooling import pool_packed
from ostro.parallel.pipeline import Stage, keep_stages, pass_through, run_stages, share_last


class StagedEmbedder(Embedder):
    """The part of an embedder that a rank of a pipeline holds; all its ranks call the methods with the same texts.

    Attributes:
        stages: Which part that is.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        stages: Sequence[Stage],
        group: dist.ProcessGroup,
        *,
        pooling: str = "avg",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Takes out of the tower what other ranks hold.

        Args:
            backbone: The whole bidirectional text tower, on any device, also the meta device; changed in place.
            stages: Which parts to keep.
            group: The ranks of the pipeline, in the order of their first stages.
            pooling: As for `Embedder`.
            dtype: Of hidden states.

        Raises:
            RecipeError: When the tower draws random numbers: the second pass would draw others.
        """
        if dropout := backbone.config.to_dict().get("attention_dropout"):
            raise RecipeError(f"parallel.pp: needs a model whose attention_dropout is 0, got {dropout}; set it to 0")
        super().__init__(backbone, pooling=pooling)
        keep_stages(backbone, stages)
        self.stages, self._group, self._dtype = tuple(stages), group, dtype

    def forward(self, packed: PackedTexts) -> torch.Tensor:
        """The vectors `[B, D]` of packed texts, without gradients, on all ranks.

        Distributed: as `pass_through` and `share`.
        """
        return self.share(self.encode(packed))

    def share(self, vectors: torch.Tensor) -> torch.Tensor:
        """The vectors that the last rank has, written over those of the others.

        Args:
            vectors: From `encode`, in any number.

        Returns:
            `vectors`.

        Distributed: as `share_last`.
        """
        share_last(vectors.detach(), self._group)
        return vectors

    def encode(self, packed: PackedTexts) -> torch.Tensor:
        """The vectors `[B, D]` of packed texts, without gradients, on the last rank; on the others anything.

        Ranks need not wait for the last one: as in a pipeline, they work on batches one after the other.

        Distributed: as `pass_through`.
        """
        num_rows = packed_rows(packed.num_tokens, self.device, self._dtype)
        states = torch.empty(1, num_rows, self.num_dims, dtype=self._dtype, device=self.device)
        compute = partial(self._stage_output, packed=packed, num_rows=num_rows)
        vectors = pass_through(self.backbone, self.stages, compute, states, group=self._group)
        is_last = self.stages[-1].is_last
        return vectors if is_last else torch.zeros(packed.num_texts, self.num_dims, device=self.device)

    def backward(self, texts: Sequence[PackedTexts], gradients: Sequence[torch.Tensor], schedule: str) -> None:
        """Adds to this rank's parameters the gradient of a loss whose gradient by the vectors is known.

        Equal to `for packed, gradient in zip(texts, gradients): embedder(packed).backward(gradient)` with the whole
        embedder.

        Args:
            texts: Micro-batches; `fitting_number` of them.
            gradients: `[B, D]` for each.
            schedule: As for `run_stages`.

        Distributed: as `run_stages`.
        """
        num_rows = packed_rows(max(packed.num_tokens for packed in texts), self.device, self._dtype)

        def compute(stage: Stage, number: int, received: torch.Tensor | None) -> torch.Tensor:
            output = self._stage_output(stage, received, packed=texts[number], num_rows=num_rows)
            return (output * gradients[number]).sum() if stage.is_last else output

        run_stages(
            self.backbone,
            self.stages,
            compute,
            range(len(texts)),
            hidden_states=torch.empty(1, num_rows, self.num_dims, dtype=self._dtype, device="meta"),
            group=self._group,
            schedule=schedule,
        )

    def _stage_output(
        self, stage: Stage, received: torch.Tensor | None, *, packed: PackedTexts, num_rows: int
    ) -> torch.Tensor:
        """Vectors on the last stage, else hidden states `[1, num_rows, D]`."""
        filled = fill_to(packed.to(self.device), num_rows)
        hidden_states = forward_packed(self.backbone, filled, received)
        if not stage.is_last:
            return hidden_states[None]
        return self._finish(pool_packed(hidden_states[: packed.num_tokens], packed.lengths, self.pooling))

"""An embedding and a head whose rows of the vocabulary are spread over ranks.

A training loss reads the rows of the head by itself, see `ostro.losses.linear_ce`. Of the embedding, each rank looks up
the tokens it has, and the sum over ranks has them all: torch's own split makes the gradient of the whole vocabulary on
every rank before it keeps its rows, here a rank never holds more than the gradient of its own.

Shapes: V rows in all, v rows of this rank, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate


class SplitEmbedding(torch.nn.Embedding):
    """`torch.nn.Embedding` whose weight `[V, H]` is a DTensor with `Shard(0)` over one axis of the mesh."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of some tokens, the same on every rank.

        Args:
            input: `[...]` token ids, the same on every rank.

        Returns:
            `[..., H]`, with the gradient of this rank's rows.

        Distributed: one all-reduce of the result over the mesh of the weight.
        """
        weight: DTensor = self.weight  # type: ignore[assignment]
        rows_vH, mesh = weight.to_local(), weight.device_mesh
        first = mesh.get_local_rank() * len(rows_vH)
        local = input - first
        absent = (local < 0) | (local >= len(rows_vH))
        padding = None if self.padding_idx is None else self.padding_idx - first
        if padding is not None and not 0 <= padding < len(rows_vH):
            padding = None  # a row of another rank
        rows = F.embedding(local.masked_fill(absent, 0), rows_vH, padding)
        # exact in any dtype: of each row, all ranks but one add zero
        partial = DTensor.from_local(rows.masked_fill(absent[..., None], 0), mesh, [Partial()], run_check=False)
        whole: torch.Tensor = partial.redistribute(placements=[Replicate()]).to_local()
        return whole


class SplitHead(torch.nn.Linear):
    """`torch.nn.Linear` without a bias whose weight `[V, H]` is a DTensor with `Shard(0)` over one axis of the mesh."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits of the whole vocabulary.

        Args:
            input: `[..., H]`, the same on every rank.

        Returns:
            `[..., V]`, the same on every rank, with the gradient of this rank's rows and that of the whole input.

        Distributed: one all-gather of the result over the mesh of the weight, and one all-reduce of the input's
            gradient in backward.
        """
        weight: DTensor = self.weight  # type: ignore[assignment]
        states = DTensor.from_local(input, weight.device_mesh, [Replicate()], run_check=False)
        logits: DTensor = F.linear(states, weight)  # type: ignore[assignment]
        # a copy: FSDP hangs hooks on what a module returns, which a view loses when it is written to
        return logits.full_tensor().clone()

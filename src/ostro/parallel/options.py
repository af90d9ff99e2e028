"""Options of ranks: how the processes of a run share its work."""

from __future__ import annotations

from typing import Literal

import pydantic

from ostro.config import Options


class ParallelOptions(Options):
    """How the ranks of a run share its work; the product of the four sizes is their number."""

    dp_replicate: int = pydantic.Field(-1, ge=-1)
    """Ranks that hold the whole model and take a share of every batch; -1 for what is left of the ranks."""
    dp_shard: int = pydantic.Field(1, ge=-1)
    """Ranks that split parameters, gradients and optimizer, and take a share of every batch too; -1 as above."""
    shard_frozen: bool = True
    """Whether `dp_shard` splits parts in `model.freeze`, too; if not, each rank holds them whole in `model.dtype`."""
    tp: int = pydantic.Field(1, ge=1)
    """Ranks that split every text layer, embedding and head, and see the same samples."""
    tp_vision: bool = False
    """Whether `tp` splits the vision tower and the projector too; otherwise each of its ranks holds all of them."""
    pp: int = pydantic.Field(1, ge=1)
    """Ranks that hold consecutive layers, and see the same samples."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of a pipeline's micro-batches: `gpipe` holds the most activations, `interleaved` idles least."""
    stages_per_rank: int = pydantic.Field(1, ge=1)
    """Stages of each rank of a pipeline: 2 or more with `interleaved`, else 1."""

"""Options of ranks: how the processes of a run share its work."""

from __future__ import annotations

import pydantic

from ostro.config import Options


class ParallelOptions(Options):
    """How the ranks of a run share its work; the product of the four sizes is their number."""

    dp_replicate: int = pydantic.Field(-1, ge=-1)
    """Ranks that hold the whole model and take a share of every batch; -1 for what is left of the ranks."""
    dp_shard: int = pydantic.Field(1, ge=-1)
    """Ranks that split parameters, gradients and optimizer, and take a share of every batch too; -1 as above."""
    tp: int = pydantic.Field(1, ge=1)
    """Ranks that split every layer; only 1 so far."""
    pp: int = pydantic.Field(1, ge=1)
    """Ranks that hold consecutive layers; only 1 so far."""

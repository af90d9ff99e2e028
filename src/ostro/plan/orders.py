"""In which order a rank of a pipeline works through the micro-batches of a step, and what it keeps meanwhile.

Bytes are left to `memory`. The idea: whatever the schedule, a rank runs some micro-batches forward, then one backward
and one forward in turn, and at the end what is left backward; schedules differ in how many run ahead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A micro-batch that a rank works on.

    Attributes:
        is_forward: Whether in its forward pass; else in its backward pass.
        stage: Which of the rank's stages works, from 0.
        others: By stage of the rank, micro-batches of which everything is kept between their two passes, without this.
        has_gradients: Whether a backward pass was before it, so that there are gradients to add to.
    """

    is_forward: bool
    stage: int
    others: tuple[int, ...]
    has_gradients: bool


@functools.cache
def turns(schedule: str, *, rank: int, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> frozenset[Turn]:
    """All that differ, of a rank in a step.

    Args:
        schedule: Of `parallel.schedule`.
        rank: In the pipeline, from 0.
        num_ranks: Of the pipeline; 1 without one.
        stages_per_rank: Of each.
        num_micro_batches: Of a step; of `interleaved`, one that it can share out.

    Source: `torch.distributed.pipelining.ScheduleGPipe`, `Schedule1F1B` and `ScheduleInterleaved1F1B`.
    """
    total = stages_per_rank * num_micro_batches
    per_round = num_micro_batches // max(1, num_micro_batches // num_ranks)
    hops = num_ranks - 1 - rank
    interleaved = (stages_per_rank - 1) * per_round + 2 * hops + 1
    ahead = min({"gpipe": total, "1f1b": hops + 1, "interleaved": interleaved}[schedule], total)
    found, in_flight = set(), [0] * stages_per_rank
    for number in range(total + ahead - 1):
        if number < total:
            stage = number // per_round % stages_per_rank
            found.add(Turn(True, stage, tuple(in_flight), number >= ahead))
            in_flight[stage] += 1
        if number >= ahead - 1:
            stage = stages_per_rank - 1 - (number - ahead + 1) // per_round % stages_per_rank
            in_flight[stage] -= 1
            found.add(Turn(False, stage, tuple(in_flight), number >= ahead))
    return frozenset(found)

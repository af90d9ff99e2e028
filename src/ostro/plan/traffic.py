"""Bytes that a rank sends in one optimizer step, by axis of the mesh, and from them how long a step may take.

The idea: every collective of a step is known from the plan, and a ring of n ranks sends `(n - 1) / n` of what it
gathers or scatters, twice that for a sum. The time is a plain sum, as if nothing ran at the same time as anything else:
good enough to put splits in order, not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ostro.plan.memory import Sizes, Split
from ostro.plan.shapes import Counts

_FLOAT32 = 4

FLOPS = 400e12
"""Operations per second that a GPU reaches in training: 40 % of what the maker of the H100 states for bfloat16."""

INSIDE = 450e9
"""Bytes per second and GPU, one way, within a machine: NVLink of the H100."""

BETWEEN = 50e9
"""Likewise between machines: one network port of 400 Gbit/s per GPU."""


@dataclass(frozen=True)
class Step:
    """What a rank sends in a step, and how long that takes.

    Attributes:
        sent: Bytes by axis.
        seconds: Compute, idle time of the pipeline and traffic, one after the other.
        idle: Share of the compute time that a rank of a pipeline waits, 0 to 1.
    """

    sent: dict[str, int]
    seconds: float
    idle: float


def step_traffic(
    sizes: Sizes, split: Split, *, num_micro_batches: int, num_tokens: int, gpus_per_machine: int, num_passes: int
) -> Step:
    """Counts the bytes of a step.

    Args:
        sizes: Of the run.
        split: Of the ranks.
        num_micro_batches: Of a rank in a step.
        num_tokens: Tokens of a step over all ranks.
        gpus_per_machine: GPUs with fast links to one another.
        num_passes: Forward passes of a micro-batch: one more where a cached loss encodes twice.
    """
    settings = sizes.settings
    item, m = settings.dtype.itemsize, num_micro_batches
    counts = sizes.counts(split.tp)
    layers = counts["language_model"].shared(split.pp)
    vision = counts.get("vision", Counts())
    rest = [weights for part, weights in counts.items() if part not in ("language_model", "vision")]
    total = layers.trained + vision.trained + sum(weights.trained for weights in rest)
    row = settings.num_tokens * settings.text_config.hidden_size * item
    # a layer's weights are gathered for each pass, those outside of the layers once for forward and backward
    of_layers, of_vision = layers.sharded(settings), vision.sharded(settings)
    forward = num_passes * (of_layers + of_vision + sum(weights.sharded(settings) for weights in rest))
    backward = of_layers + (of_vision if vision.trained else 0)
    gathered = m * item * (forward + backward)
    sums = m * (num_passes + settings.recompute + 1) * 2 * settings.text_config.num_hidden_layers // split.pp
    summed = 2 * sums * row
    if settings.tp_vision and settings.num_patches:
        config: Any = vars(settings.config)["vision_config"]
        passes = 1 + (1 + settings.recompute if vision.trained else 0)
        patches = settings.num_patches * config.hidden_size * item
        summed += 2 * m * passes * 2 * config.num_hidden_layers * patches
    reductions = m if split.dp_shard > 1 else 1
    sent = {
        "tp": _ring(split.tp) * summed,
        "dp_shard": _ring(split.dp_shard) * (gathered + m * _FLOAT32 * total),
        "dp_replicate": _ring(split.dp_replicate) * 2 * reductions * _FLOAT32 * total / split.dp_shard,
        "pp": float(2 * settings.stages_per_rank * m * row) if split.pp > 1 else 0.0,
    }
    reach, traffic_s = 1, 0.0
    for axis in ("tp", "dp_shard", "dp_replicate", "pp"):
        reach *= vars(split)[axis]
        traffic_s += sent[axis] / (INSIDE if reach <= gpus_per_machine else BETWEEN)
    whole = sizes.counts(1)
    matrices = whole["language_model"].all + whole.get("head", Counts()).all
    compute_s = 2 * matrices * num_tokens * (num_passes + settings.recompute + 2) / (split.num_ranks * FLOPS)
    # a rank that waits for another waits for one of its stages alone
    idle = (split.pp - 1) / (settings.stages_per_rank * m + split.pp - 1)
    return Step({axis: int(size) for axis, size in sent.items()}, compute_s / (1 - idle) + traffic_s, idle)


def _ring(num_ranks: int) -> float:
    return (num_ranks - 1) / num_ranks

"""The ranks that evaluate a model together: who takes which samples, and how a model is run that none of them holds
whole.

What is evaluated is left to `answers` and `shared`. The idea: samples are dealt out over the ranks that see other data
in training too. Where these gather each other's weights, each pass has to be run by all of them, so one that has fewer
samples runs along on a blank one; along a pipeline a batch is passed from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ostro.parallel.pipeline import Stage, pass_through
from ostro.train.ranks import Ranks


@dataclass(frozen=True)
class Judges:
    """Ranks with a part each of the samples, and perhaps of the model; by default one process with all of both.

    Attributes:
        ranks: All of the run.
        data: Those that share the samples.
        in_step: Those that have to run the same passes, as they gather each other's weights.
        stage: The part of a pipeline that this rank holds.
        stages: The ranks of the pipeline, by stage.
        dtype: Of hidden states.
    """

    ranks: Ranks = field(default_factory=Ranks)
    data: Ranks = field(default_factory=Ranks)
    in_step: Ranks = field(default_factory=Ranks)
    stage: Stage | None = None
    stages: dist.ProcessGroup | None = None
    dtype: torch.dtype = torch.float32

    @property
    def has_output(self) -> bool:
        """Whether what comes out of the model comes out on this rank."""
        return self.stage is None or self.stage.is_last

    def run(self, compute: Callable[[torch.Tensor | None], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """A pass through the model, of which this rank may hold a stage.

        Args:
            compute: Maps the hidden states before this stage, None on the first, to its output.
            states: Of the shape, dtype and device of hidden states, to receive them into; not looked at otherwise.

        Distributed: as `pass_through`.
        """
        if self.stage is None or self.stages is None:
            return compute(None)
        return pass_through(compute, states, stage=self.stage, group=self.stages)

    def share(self, output: torch.Tensor) -> torch.Tensor:
        """What the last stage has, on all stages.

        Args:
            output: On the last stage the value, elsewhere a tensor of its shape and dtype, which is written.

        Distributed: one broadcast over the pipeline.
        """
        if self.stages is not None:
            dist.broadcast(output, group=self.stages, group_src=self.stages.size() - 1)
        return output

"""The ranks that evaluate a model together: who takes which samples, and how a model is run that none of them holds
whole.

What is evaluated is left to `answers` and `shared`. The idea: samples are dealt out over the ranks that see other data
in training too. Where these gather each other's weights, each pass has to be run by all of them, so one that has fewer
samples runs along on a blank one; along a pipeline a batch is passed from stage to stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from ostro.parallel.pipeline import Stage
from ostro.train.metrics import LiveLine
from ostro.train.ranks import Ranks
from ostro.train.table import summarise


@dataclass(frozen=True)
class Judges:
    """Ranks with a part each of the samples, and perhaps of the model; by default one process with all of both.

    Attributes:
        ranks: All of the run.
        data: Those that share the samples.
        in_step: Those that have to run the same passes, as they gather each other's weights.
        pipeline: Those that hold other layers; None where each has all.
        own_stages: The stages that this rank holds.
        dtype: Of hidden states.
    """

    ranks: Ranks = field(default_factory=Ranks)
    data: Ranks = field(default_factory=Ranks)
    in_step: Ranks = field(default_factory=Ranks)
    pipeline: dist.ProcessGroup | None = None
    own_stages: tuple[Stage, ...] = ()
    dtype: torch.dtype = torch.float32

    def keep_untrained(self, folder: str, metrics: Mapping[str, float], line: LiveLine) -> None:
        """Writes down what the untrained model scores, for the result page, and shows it.

        Args:
            folder: Run folder.
            metrics: Of the test set.
            line: Where it is shown.

        Distributed: on rank 0, as `Ranks.on_main`.
        """

        def keep() -> None:
            (Path(folder) / "untrained.json").write_text(json.dumps(dict(metrics)) + "\n", encoding="utf-8")
            line.say(f"before training  {summarise(metrics)}")

        self.ranks.on_main(keep)

"""How long a checkpoint keeps training waiting: written in the background, against written at once.

A network of 90 M float32 parameters is trained with AdamW, a state of 1.1 GB. The same loop saves at every fourth step,
as `train.async_save=false` does and as by default, and not at all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import table, write_result

from ostro.checkpoint.background_save import BackgroundSave
from ostro.checkpoint.train_state import save_train_state

_NUM_LAYERS, _WIDTH = 30, 1730
_SAVE_EVERY = 4


class Training:
    """A network, its optimizer, and one step after the other."""

    def __init__(self, batch_rows: int) -> None:
        """Takes one step, which makes the moments."""
        torch.manual_seed(0)
        layers = [torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_NUM_LAYERS)]
        self._model = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.GELU())))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._rows = torch.randn(batch_rows, _WIDTH)
        self.step(lambda: None)

    def step(self, wait: Callable[[], object]) -> float:
        """Gradients, then `wait`, then the update; the seconds that `wait` took."""
        self._model(self._rows).square().mean().backward()
        started = time.perf_counter()
        wait()
        waited = time.perf_counter() - started
        self._optimizer.step()
        self._optimizer.zero_grad()
        return waited

    def state(self) -> dict[str, Any]:
        """Weights and moments, the live ones."""
        weights = dict(self._model.named_parameters())
        return {"weights": weights, "optimizer": {name: self._optimizer.state[w] for name, w in weights.items()}}


def saved_steps(training: Training, kind: str, saver: BackgroundSave, folder: Path, number: int) -> tuple[float, float]:
    """Saves, and takes the steps until the next save; seconds blocked by the save, and seconds of the steps."""
    started = time.perf_counter()
    if kind == "at once":
        save_train_state(folder, number, training.state(), keep_last=1)
    elif kind == "in the background":
        saver.start(folder, number, training.state(), keep_last=1)
    blocked = time.perf_counter() - started
    started = time.perf_counter()
    waited = [training.step(saver.wait_copied) for _ in range(_SAVE_EVERY)]
    return blocked + sum(waited), time.perf_counter() - started - sum(waited)


def main() -> None:
    """Measures both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", help="folder with 4 GB free on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch: how long a step takes")
    arguments = parser.parse_args()
    training = Training(arguments.rows)
    figures: dict[str, list[tuple[float, float]]] = {"none": [], "at once": [], "in the background": []}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch, BackgroundSave() as saver:
        for number in range(arguments.repeats):
            for kind, pairs in figures.items():
                pairs.append(saved_steps(training, kind, saver, Path(scratch) / kind, number))
                saver.finish()
    medians = {
        kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in figures.items()
    }
    rows = [
        {
            "checkpoint": kind,
            "blocked s": f"{blocked:.3f}",
            "of that at once": f"{blocked / medians['at once'][0]:.4f}",
            "four steps s": f"{steps:.1f}",
            "longer than without s": f"{blocked + steps - medians['none'][1]:.1f}",
        }
        for kind, (blocked, steps) in medians.items()
    ]
    num_bytes = 12 * sum(weight.numel() for weight in training.state()["weights"].values())
    body = (
        f"State: {num_bytes / 1e9:.2f} GB; medians of {arguments.repeats} saves of each kind, in turn. `blocked` is "
        "the time in which no step is computed: in the call that saves, and before the step of the optimizer while the "
        "copy is not there. Target: at most 0.1 of that at once. The steps beside the writing thread share cores and "
        "memory with it, which `four steps` shows."
    )
    body += "\n\n" + table(rows, list(rows[0]))
    write_result("checkpoint_save", "How long a checkpoint keeps training waiting", body, packages=["torch"])


if __name__ == "__main__":
    main()

"""What a run tells: rows in `metrics.jsonl`, optional trackers, and the live line on the terminal.

Every number is written once, here; the report and the plots read the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ostro.errors import OstroError, missing_extra
from ostro.train.options import TrackOptions

Row = Mapping[str, float]


class Tracker(Protocol):
    """Receives each row of numbers."""

    def log(self, step: int, row: Row) -> None:
        """Writes one row."""

    def close(self) -> None:
        """Flushes and ends the tracker's run."""


class MetricsFile:
    """Appends rows to `metrics.jsonl`; on resume, rows after the checkpoint are dropped, so that no step stands
    twice."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Opens the file.

        Args:
            path: The file; made when missing.
            resumed_step: Step of the checkpoint the run starts from; 0 for a new run.
        """
        kept = []
        if path.exists() and resumed_step > 0:
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resumed_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("ab", buffering=0)  # a row that a full disk refused must not come up again on closing

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """Appends one JSON row.

        Raises:
            OstroError: When it cannot be written.
        """
        try:
            self._file.write((json.dumps({"step": step, **row}) + "\n").encode())
        except OSError as error:
            raise OstroError(f"{self._file.name}: cannot be written ({error.strerror}); make room there") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: str) -> int:
    """The step of a row; a row torn by a kill counts as after everything."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 2**63


def open_trackers(backends: tuple[str, ...], *, folder: Path, project: str) -> list[Tracker]:
    """Starts the trackers asked for.

    Args:
        backends: Any of `tensorboard`, `wandb`, `trackio`.
        folder: Run folder; its name names the run.
        project: Project name for wandb and trackio.

    Returns:
        One tracker per backend.

    Raises:
        OstroError: When a package is not installed.
    """
    makers = {"tensorboard": _Tensorboard, "wandb": _wandb, "trackio": _trackio}
    return [makers[backend](folder, project) for backend in backends]


class _Tensorboard:
    def __init__(self, folder: Path, project: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("track", "tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _ModuleRun:
    """A tracker whose package offers `init`, `log` and `finish` (wandb, trackio)."""

    def __init__(self, module: object, folder: Path, project: str) -> None:
        self._module: object = module
        module.init(project=project, name=folder.name)  # type: ignore[attr-defined]

    def log(self, step: int, row: Row) -> None:
        self._module.log(dict(row), step=step)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._module.finish()  # type: ignore[attr-defined]


def _wandb(folder: Path, project: str) -> Tracker:
    try:
        import wandb
    except ImportError as error:
        raise missing_extra("track", "wandb") from error
    return _ModuleRun(wandb, folder, project)


def _trackio(folder: Path, project: str) -> Tracker:
    try:
        import trackio
    except ImportError as error:
        raise missing_extra("track", "trackio") from error
    return _ModuleRun(trackio, folder, project)


class RunLog:
    """Every place a row of numbers goes: `metrics.jsonl` and the trackers."""

    def __init__(self, file: MetricsFile, trackers: list[Tracker]) -> None:
        """Use `open_log` instead."""
        self._file, self._trackers = file, trackers

    def row(self, step: int, row: Row) -> None:
        """Writes the numbers of a step."""
        self._file.log(step, row)
        for tracker in self._trackers:
            tracker.log(step, row)

    def evaluation(self, step: int, split: str, metrics: Row) -> None:
        """Writes the scores of an evaluation after a step."""
        self._file.log(step, {"evaluation": dict(metrics), "split": split})
        for tracker in self._trackers:
            tracker.log(step, {f"{split}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Closes the file and ends the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


@contextmanager
def open_log(folder: Path, options: TrackOptions, *, resumed_step: int, is_main: bool = True) -> Iterator[RunLog]:
    """Opens the run's log while the block lasts.

    Args:
        folder: Run folder.
        options: Trackers asked for.
        resumed_step: Step of the checkpoint the run starts from; 0 for a new run.
        is_main: Whether this rank writes; what the others log is dropped.

    Yields:
        The log.

    Raises:
        OstroError: When a tracker's package is not installed.
    """
    file = MetricsFile(folder / "metrics.jsonl" if is_main else Path(os.devnull), resumed_step=resumed_step)
    log = RunLog(file, open_trackers(options.backends if is_main else (), folder=folder, project=options.project))
    try:
        yield log
    finally:
        log.close()


class Throughput:
    """Tokens per second of wall time since the last reading, and the share of the device's best that they took."""

    def __init__(self, peak_flops: float | None) -> None:
        """Starts the clock.

        Args:
            peak_flops: Floating-point operations per second of the device; None where operations are not counted.
        """
        self._peak_flops = peak_flops
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted, so that time spent on something else does not count."""
        self._started = time.perf_counter()
        self._num_tokens, self._flops = 0, 0.0

    def add(self, flops: float, num_tokens: int) -> None:
        """Counts the operations and tokens of a step."""
        self._flops += flops
        self._num_tokens += num_tokens

    def read(self) -> dict[str, float]:
        """`tokens_per_s` since the last call, and `mfu` where operations are counted; starts anew."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        row = {"tokens_per_s": self._num_tokens / seconds}
        if self._peak_flops is not None:
            row["mfu"] = self._flops / seconds / self._peak_flops
        self.restart()
        return row


class LiveLine:
    """The run on the terminal: a progress bar where there is a terminal, else one line per logged step."""

    def __init__(self, console: Console, progress: Progress, task: TaskID) -> None:
        """Use `live_line` instead."""
        self._console, self._progress, self._task = console, progress, task

    def advance(self) -> None:
        """Counts one optimizer step."""
        self._progress.advance(self._task)

    def show(self, step: int, row: Row) -> None:
        """Shows the numbers of a logged step."""
        text = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.out(f"step {step}  {text}  lr {row['learning_rate']:.2e}", highlight=False)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.out(text, highlight=False)


@contextmanager
def live_line(console: Console, *, num_steps: int, first_step: int) -> Iterator[LiveLine]:
    """Shows the run while the block lasts.

    Args:
        console: Where to print.
        num_steps: Optimizer steps of the whole run.
        first_step: Steps already done.

    Yields:
        The line to update.
    """
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield LiveLine(console, progress, progress.add_task("starting", total=num_steps, completed=first_step))

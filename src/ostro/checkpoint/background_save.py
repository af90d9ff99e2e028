"""Checkpoints written beside training: `BackgroundSave`, a thread that writes one at a time.

The files and their publication are left to `train_state`. The idea: a state changes only when the optimizer takes its
step. So the thread copies the tensors to host memory while the next step computes its gradients; the optimizer waits
for the copies, which are there by then, and the files are written while training goes on. Ranks that write together use
a process group of their own, since their collectives would mix with those of training on any other.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ostro.checkpoint.train_state import SINGLE_PROCESS, write_train_state


class BackgroundSave:
    """Writes checkpoints in a thread; a context manager that waits for the last one.

    Its calls are those of one thread, the one that trains.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copied = threading.Event()
        self._copied.set()
        self._written: Future[Path] | None = None
        # for good, as `warnings.catch_warnings` is not for threads: it would undo what others do meanwhile
        warnings.filterwarnings("ignore", SINGLE_PROCESS, UserWarning)

    def start(
        self,
        folder: Path,
        step: int,
        state: Mapping[str, Any],
        *,
        keep_last: int,
        keep: Collection[int] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Begins to write a checkpoint; `state` must not change before `wait_copied`.

        Args:
            folder: As for `save_train_state`, and so the others.
            step: Optimizer steps done.
            state: Nested mappings of tensors and plain values; needs its size of host memory until it is written.
            keep_last: Checkpoints to keep.
            keep: Steps whose checkpoints are kept besides.
            group: Ranks that write together; a gloo group that nothing else uses.

        Raises:
            CheckpointError: When the one before could not be written.

        Distributed: none here; the thread makes those of `save_train_state`.
        """
        self.finish()
        self._copied.clear()

        def work() -> Path:
            try:
                own = _copy(state)
            finally:
                self._copied.set()
            return write_train_state(folder, step, own, keep_last=keep_last, keep=keep, group=group)

        self._written = self._executor.submit(work)

    def wait_copied(self) -> None:
        """Returns when the state may change."""
        self._copied.wait()

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint is known to be not written; `finish` tells why."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def finish(self) -> None:
        """Waits until the checkpoint is published.

        Raises:
            CheckpointError: When it could not be written; told once.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def __enter__(self) -> BackgroundSave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    return copy.deepcopy(value)

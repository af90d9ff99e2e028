"""The worker thread of a training loader: started with the first batch, ended with the loader.

What a batch is, and what position goes with it, is the loader's own affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Batch = TypeVar("Batch")


class BackgroundLoader(Iterator[Batch], Generic[Batch]):
    """An iterator whose batches are made by a worker thread, in order; a context manager that ends the thread.

    Subclasses start `_worker` in `__next__` where it is None, and queue what it makes in `_prepared`.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._worker: ThreadPoolExecutor | None = None
        self._prepared: deque[Future[Any]] = deque()

    def close(self) -> None:
        """Ends the worker thread. Asking for another batch starts it again from the same position."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._worker = None
        self._prepared.clear()

    def __enter__(self) -> Self:
        """The loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the worker thread."""
        self.close()

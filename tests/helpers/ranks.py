"""A pool of gloo ranks: real processes with real collectives, started once for the whole test run.

A rank is started when a test first needs it, imports torch once and then serves one function call after the other.
Every run makes a fresh default process group of exactly the ranks it asks for, so that code under test may use the
default group, a mesh over it, or the group it is handed. A rank that fails dies, and its whole output is the error;
the ranks left, which may be stuck in a collective, end with it, and the next run starts new ones.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

MAX_RANKS = 4


class RankError(AssertionError):
    """A function failed on a rank, or did not answer in time; the message holds what its ranks wrote to stderr."""


class RankPool:
    """Up to `MAX_RANKS` processes; a context manager that ends those it started."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._num_runs = 0
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def run(self, fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout_s: float = 100) -> list[Any]:
        """Calls `fn(group, *args)` on ranks 0 to `world_size - 1` at once.

        Args:
            fn: Function at the top of an importable module; `group` is the default process group of the run.
            *args: Picklable arguments, the same on every rank.
            world_size: Ranks that take part, 1 to `MAX_RANKS`.
            timeout_s: Seconds for all of it, the start of new ranks included.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: When a rank raised, died or did not answer in time.
            ValueError: When `world_size` is out of range.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size: must be 1 to {MAX_RANKS}, got {world_size}")
        if not all(process.is_alive() for process, _ in self._ranks):
            self._end()
        while len(self._ranks) < world_size:
            self._start()
        connections = [connection for _, connection in self._ranks[:world_size]]
        self._num_runs += 1
        store = str(Path(self._folder.name) / f"run-{self._num_runs}")
        for rank, connection in enumerate(connections):
            # Plain pickle: the pipe's own would send tensors as handles to shared memory of the sender.
            connection.send_bytes(pickle.dumps((store, rank, world_size, fn, args)))
        results: list[Any] = []
        try:
            results = self._collect(connections, time.monotonic() + timeout_s)
        finally:
            # Also after a test's own time limit: an answer left in a pipe would be taken for that of the next run.
            if not results:
                self._end()
        return results

    def _collect(self, connections: list[Connection], deadline: float) -> list[Any]:
        results: dict[Connection, Any] = {}
        while len(results) < len(connections):
            waiting = [connection for connection in connections if connection not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                self._fail(f"ranks {[connections.index(connection) for connection in waiting]} did not answer in time")
            for connection in waiting:
                if connection in ready:
                    try:
                        results[connection] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        self._fail(f"rank {connections.index(connection)} failed")
        return [results[connection] for connection in connections]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, str(self._log(len(self._ranks)))), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, ours))

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"stderr-{rank}"

    def _fail(self, message: str) -> NoReturn:
        # The others fail at their next collective; a moment lets the rank that failed first and theirs finish writing.
        for process, _ in self._ranks:
            process.join(1)
        num_ranks = len(self._ranks)
        self._end()
        logs = [(rank, self._log(rank).read_text(errors="replace")) for rank in range(num_ranks)]
        raise RankError(message + "".join(f"\n--- rank {rank} ---\n{text}" for rank, text in logs if text))

    def _end(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()


def _serve(connection: Connection, log: str) -> None:
    """The life of a rank: answer calls until the pool hangs up."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Loopback: the host's own name need not resolve where tests run.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        os.ftruncate(2, 0)
        connection.send_bytes(pickle.dumps(_answer(call)))


def _answer(call: bytes) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Left standing until now: a rank that finishes first must not close the connections the others still read from.
    if dist.is_initialized():
        dist.destroy_process_group()
    store, rank, world_size, fn, args = pickle.loads(call)
    # Shorter than the time a run has, so that a hanging collective is named in a traceback.
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    return fn(dist.group.WORLD, *args)

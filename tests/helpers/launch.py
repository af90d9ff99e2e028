"""Ranks of `ostro train` as processes that may be killed: started at once, from a process that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_PRELOADED = ["ostro.train.embed", "ostro.train.vlm", "tests.helpers.launch", "matplotlib.figure"]
_LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


class Launch:
    """The ranks of one start of a run; a context manager that kills those it leaves.

    Attributes:
        ranks: Their processes, by rank.
        logs: What each writes, by rank.
    """

    def __init__(
        self,
        words: Sequence[str],
        logs: Path,
        *,
        num_ranks: int = 2,
        before: Callable[[int], object] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        """Starts `ostro train WORDS` on all ranks.

        Args:
            words: Recipe and overrides.
            logs: Folder for `rank-0.log` and so on; earlier ones are removed.
            num_ranks: Processes; one has no variables of torchrun.
            before: Called with the rank in each process before all else; picklable.
            missing: Variables of torchrun that are not set.
        """
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(num_ranks)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.ranks = []
        for rank, log in enumerate(self.logs):
            shared = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {"RANK": rank, "LOCAL_RANK": rank, **shared} if num_ranks > 1 else {}
            kept = {name: str(value) for name, value in variables.items() if name not in missing}
            process = context.Process(target=_train, args=(list(words), str(log), kept, before), daemon=True)
            process.start()
            self.ranks.append(process)

    def kill(self, rank: int) -> None:
        """Ends a rank as a machine does, or the kernel short of memory."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 60) -> list[int]:
        """Exit codes by rank, once all have ended.

        Raises:
            AssertionError: When one did not, with what they wrote.
        """
        for process in self.ranks:
            process.join(timeout_s)
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, f"exit codes {codes} after {timeout_s} s\n{self.text()}"
        return [code for code in codes if code is not None]

    def text(self, ranks: Sequence[int] | None = None) -> str:
        """What all ranks wrote, or those given, one after the other."""
        logs = [self.logs[rank] for rank in range(len(self.logs)) if ranks is None or rank in ranks]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.ranks:
            process.kill()
            process.join()


def _train(words: list[str], log: str, variables: dict[str, str], before: Callable[[int], object] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # the process that this one was forked from has no text streams of its own here
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update({"GLOO_SOCKET_IFNAME": _LOOPBACK, "OMP_NUM_THREADS": "1", **variables})

    import torch
    from transformers.utils.logging import disable_progress_bar

    from ostro.cli import main

    disable_progress_bar()  # the command does it by a variable that is read at import
    torch.set_num_threads(1)
    if before is not None:
        before(int(variables.get("RANK", "0")))
    main(["train", *words])

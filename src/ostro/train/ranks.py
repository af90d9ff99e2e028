"""The processes of a run: one, or several that torchrun started, and how they act as one.

Which of them share what is left to `ostro.parallel`. The idea: all ranks do the same things in the same order, and what
can fail on one of them is put into an `agreed` block, at whose end all learn whether it did. So a wrong row on one rank
stops all of them between two steps; the rank that met it tells, the others end in silence, and none waits for ever.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ostro.errors import OstroError, ToldElsewhere
from ostro.train.watch import watched

Item = TypeVar("Item")
Result = TypeVar("Result")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Longer than rank 0 takes for an export, while the others wait; a rank that dies is noticed at once.
_TIMEOUT = datetime.timedelta(hours=4)
# How long the ranks wait for each other at the start.
_MEETING = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, or among some of them.

    Attributes:
        rank: From 0 within the group.
        world_size: Number of ranks.
        group: Those ranks; None for one process, for which every method here gives back what it got.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the default process group; one process where there is none."""
        if not dist.is_initialized():
            return cls()
        return cls.of(dist.group.WORLD)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """This process among those of a group, counted from 0 within it; one process for None."""
        return cls() if group is None else cls(group.rank(), group.size(), group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return self.rank, self.world_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks.

        Distributed: one all-reduce of k float64.
        """
        return self._reduce(values, torch.float64, dist.ReduceOp.SUM)

    def maximum(self, value: int) -> int:
        """The largest of the ranks' values.

        Distributed: one all-reduce of an int64.
        """
        return int(self._reduce([value], torch.int64, dist.ReduceOp.MAX)[0])

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; any that can be pickled.

        Distributed: two all-gathers.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def separate_group(self) -> dist.ProcessGroup | None:
        """All ranks in a new group on the CPU, for the collectives of a thread; None for one process.

        Distributed: all ranks call it.
        """
        return None if self.group is None else dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every n-th item of what n ranks share, beginning with the number of this one."""
        return items[self.rank :: self.world_size]

    def gather_shares(self, own: Sequence[Any]) -> list[Any]:
        """Results for shared items in the order of the items.

        Args:
            own: Those for this rank's `share_of` them; any that can be pickled.

        Distributed: as `gather`.
        """
        shares = self.gather(list(own))
        results: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            results[rank :: self.world_size] = share
        return results

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds on all ranks or fails on all of them.

        It must not hold collectives, which a rank that failed would leave the others waiting in.

        Raises:
            OstroError: As raised in the block, on the first rank that did.
            OSError: Likewise.
            ToldElsewhere: On the other ranks.

        Distributed: one all-reduce of an int64 at its end.
        """
        caught: OstroError | OSError | None = None
        try:
            yield
        except (OstroError, OSError) as error:
            caught = error
        first = self.world_size - self.maximum(0 if caught is None else self.world_size - self.rank)
        if first < self.world_size:
            raise caught if caught and first == self.rank else ToldElsewhere(f"rank {first} failed and tells why")

    @contextmanager
    def told_once(self) -> Iterator[None]:
        """A block that may hold collectives and fails on all ranks alike or on none; rank 0 tells.

        Raises:
            OstroError: As raised in the block; on the other ranks `ToldElsewhere`.

        Distributed: no collectives.
        """
        try:
            yield
        except OstroError as error:
            if self.is_main:
                raise
            raise ToldElsewhere(str(error)) from error

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """What `work`, without collectives, gives on rank 0; None on the others, which wait.

        Distributed: as `agreed`.
        """
        with self.agreed():
            return work() if self.is_main else None

    def _reduce(self, values: Sequence[float], dtype: torch.dtype, op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.group is None:
            return list(values)
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        totals = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(totals, op=op, group=self.group)
        reduced: list[float] = totals.tolist()
        return reduced


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """Joins the other processes of the run while the block lasts, where torchrun's variables say there are any.

    Yields:
        This process among them: gloo on the CPU, NCCL on CUDA, where it takes the device of its local rank.

    Raises:
        OstroError: When some of the variables are missing or the processes do not find each other in `_MEETING`: on
            the rank that its variable says is 0, whether or not it is there.
        ToldElsewhere: On the other ranks; also when a rank is gone, see `watch`.

    Distributed: waits for all ranks.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given) or os.environ.get("WORLD_SIZE") == "1":
        yield Ranks()
        return
    if missing := [name for name in _VARIABLES if name not in given]:
        message = (
            f"{', '.join(missing)}: not set, while {given[0]} is {os.environ[given[0]]}; start the run with torchrun, "
            f"or set all of {', '.join(_VARIABLES)}, or none for one process"
        )
        raise OstroError(message) if _tells() else ToldElsewhere(message)
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=_MEETING))
        # torchrun keeps its store when it starts the ranks again, with the addresses of those that are gone
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
        # a backend would wait for hours for a rank that is not there, or that counts another number of them
        store.set(f"rank {rank} of {world_size}", "")
        store.wait([f"rank {other} of {world_size}" for other in range(world_size)], _MEETING)
        backend = "nccl" if has_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).partition("\n")[0]
        message = (
            f"MASTER_ADDR, MASTER_PORT: the ranks do not meet at {place} ({reason}); set them alike on all ranks, to "
            f"the machine of rank 0 and a free port there, and start {os.environ['WORLD_SIZE']} ranks (WORLD_SIZE), "
            "each with its own RANK"
        )
        raise (OstroError(message) if _tells() else ToldElsewhere(message)) from error
    try:
        with watched(dist.get_rank(), dist.get_world_size()):
            yield Ranks.current()
    finally:
        dist.destroy_process_group()


def _tells() -> bool:
    """Whether this process is the one to tell what went wrong before the ranks have met: rank 0, by its variable."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0

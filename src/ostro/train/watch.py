"""Ranks that learn at once when another one is gone: `watched`.

The idea: rank 0 keeps a receive open with every other rank, and each of them with rank 0, in a thread and on a group of
their own. A rank that ends says so first. One that is killed cannot; but the system closes its connections, which ends
the receive with an error. So nothing is sent while all is well, a rank that only computes for long is not taken for
dead, and it works under NCCL, whose own collectives would wait for the dead rank.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from ostro.errors import ToldElsewhere, is_out_of_memory

_DONE, _FAILED, _GONE = 1, 2, 3
_FOREVER = datetime.timedelta(days=3650)
# How long a rank may take to find out why a collective failed, and then to end: torchrun kills after 30 s.
_WORD_S, _GRACE_S = 3.0, 20.0
_ADVICE = "it was killed (out of memory?) or its machine stopped; run the same command again to go on"


@contextmanager
def watched(rank: int, world_size: int) -> Iterator[None]:
    """A block in which a rank that ends early makes the others end too, with one message that names it.

    Args:
        rank: This one.
        world_size: Ranks of the default group, > 1.

    Raises:
        ToldElsewhere: On the ranks left, once a collective failed; one that is stuck ends with exit code 1 after 20 s.

    Distributed: makes a gloo group and gathers host and process of all ranks; at the end, waits for the others.
    """
    watch = _Watch(rank, world_size)
    word = _FAILED
    try:
        yield
        word = _DONE
    except RuntimeError as error:  # a failed collective: gloo's have no class of their own
        if is_out_of_memory(error) or not watch.is_over.wait(_WORD_S):
            raise
        raise ToldElsewhere("another rank ended, which was told elsewhere") from error
    finally:
        watch.leave(word)


class _Watch:
    """The threads that listen, and what they have heard.

    Attributes:
        is_over: Set when another rank has failed or is gone.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.is_over = threading.Event()
        self._rank = rank
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._places: list[str] = [""] * world_size
        dist.all_gather_object(
            self._places, f"rank {rank} of {world_size} (process {os.getpid()} on {socket.gethostname()})", self._group
        )
        self._lock = threading.Lock()
        self._has_spoken = self._is_known = False
        self._has_left = threading.Event()
        self._peers = range(1, world_size) if rank == 0 else range(1)
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self._peers]
        for thread in self._threads:
            thread.start()

    def leave(self, word: int) -> None:
        """Tells the others, and waits a moment until they have told too."""
        if not self.is_over.is_set():
            self._has_left.set()
        self._say(word)
        for thread in self._threads:
            thread.join(0 if self.is_over.is_set() else _WORD_S)

    def _listen(self, peer: int) -> None:
        word = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(word, src=peer, group=self._group)
        except RuntimeError:
            word.fill_(_GONE)
        with self._lock:
            if word.item() == _DONE or self._has_left.is_set() or self._is_known:
                return
            self._is_known = True
            # rank 0 tells, or, when that is the one, the next
            if word.item() == _GONE and self._rank == (1 if peer == 0 else 0):
                os.write(2, f"error: {self._places[peer]} is gone: {_ADVICE}\n".encode())
        self._say(_FAILED)
        self.is_over.set()
        if not self._has_left.wait(_GRACE_S):
            os._exit(1)

    def _say(self, word: int) -> None:
        with self._lock:
            if self._has_spoken:
                return
            self._has_spoken = True
            # inside the lock: the one that is second here goes on to destroy the group
            for peer in self._peers:
                with suppress(RuntimeError):  # gone itself
                    dist.send(torch.tensor([word]), dst=peer, group=self._group)

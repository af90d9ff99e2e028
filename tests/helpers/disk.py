"""A disk that is full, without one: files of this process cannot grow beyond a limit for a while."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(*, max_file_bytes: int) -> Iterator[None]:
    """A write beyond `max_file_bytes` of a file is an OSError (Python ignores the signal), as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

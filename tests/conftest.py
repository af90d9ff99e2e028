"""Fixtures of every test."""

from __future__ import annotations

import os

# Before torch is imported, here and in every process a test starts: on tiny tensors a second thread only waits for the
# first, and on a busy machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks shared by the whole run; see `RankPool.run`."""
    with RankPool() as pool:
        yield pool

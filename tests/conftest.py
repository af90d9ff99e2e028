"""Fixtures of every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks shared by the whole run; see `RankPool.run`."""
    with RankPool() as pool:
        yield pool

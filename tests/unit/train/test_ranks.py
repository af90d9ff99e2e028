"""Processes of a run, seen from one: started alone, or told by variables that something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostro.errors import DataError, OstroError, RecipeError
from ostro.train.ranks import Ranks, started_ranks
from ostro.train.runtime import open_run_folder

VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({}, {**VARIABLES, "WORLD_SIZE": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with started_ranks() as ranks:
            assert ranks == Ranks(0, 1, None)
            assert ranks == Ranks.current()


def test_one_process_gives_back_what_it_got() -> None:
    ranks = Ranks()
    assert ranks.sum([0.1, 3]) == [0.1, 3]
    assert ranks.maximum(-7) == -7
    assert ranks.gather("a") == ["a"]
    with pytest.raises(DataError, match=r"^row 3$"), ranks.agreed():
        raise DataError("row 3")
    with pytest.raises(ZeroDivisionError), ranks.agreed():
        _ = 1 / 0


def test_missing_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"^LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set, while RANK is 1; start the run with torchrun"
    with pytest.raises(OstroError, match=message), started_ranks():
        pass


def test_the_mesh_may_change_between_resumes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    texts = [
        "seed: 1\nparallel:\n  dp_replicate: 2\n  tp: 1\ntrack: {}\n",
        "seed: 1\nparallel:\n  dp_replicate: -1\ntrack: {}\n",
    ]
    for text in (*texts, "seed: 1\ntrack: {}\n"):
        open_run_folder(tmp_path, text)
    with pytest.raises(RecipeError, match=r"\(seed: 1 -> 2\); choose"):
        open_run_folder(tmp_path, "seed: 2\nparallel:\n  dp_replicate: 2\ntrack: {}\n")

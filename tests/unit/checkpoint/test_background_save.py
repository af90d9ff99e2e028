"""A checkpoint written beside training holds the state as it was, and a failure is told once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ostro.checkpoint import background_save
from ostro.checkpoint.background_save import BackgroundSave
from ostro.checkpoint.train_state import latest_train_state, load_train_state
from ostro.errors import CheckpointError
from tests.helpers.disk import full_disk


def state_at(step: int) -> dict[str, Any]:
    return {"step": step, "weights": {f"w{i}": torch.full((100, 100), float(step)) for i in range(5)}, "seen": {"n": 1}}


def test_it_holds_the_state_of_the_moment(tmp_path: Path) -> None:
    live = state_at(1)
    with BackgroundSave() as saver:
        for step in (1, 2, 3):
            saver.start(tmp_path, step, live, keep_last=3)
            saver.wait_copied()
            for weight in live["weights"].values():
                weight += 1
            live["step"] += 1
            live["seen"]["n"] += 1
    for step in (1, 2, 3):
        loaded = load_train_state(tmp_path / f"step-{step:08d}", state_at(0))
        assert (loaded["step"], loaded["seen"]) == (step, {"n": step})
        assert all((weight == step).all() for weight in loaded["weights"].values())


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    write = background_save.write_train_state

    def slow(*arguments: Any, **options: Any) -> Path:
        assert may_write.wait(30)
        return write(*arguments, **options)

    monkeypatch.setattr(background_save, "write_train_state", slow)
    with BackgroundSave() as saver:
        saver.start(tmp_path, 1, state_at(1), keep_last=1)
        saver.wait_copied()
        assert latest_train_state(tmp_path) is None
        assert not saver.has_failed
        may_write.set()
        saver.finish()
        assert latest_train_state(tmp_path) == tmp_path / "step-00000001"


def test_a_failure_is_told_once_and_the_next_one_works(tmp_path: Path) -> None:
    with BackgroundSave() as saver:
        saver.start(tmp_path, 1, state_at(1), keep_last=1)
        saver.finish()
        with full_disk(max_file_bytes=10_000):
            saver.start(tmp_path, 2, state_at(2), keep_last=1)
            with pytest.raises(CheckpointError, match=r"step-00000002: cannot be written \(File too large\)"):
                saver.start(tmp_path, 3, state_at(3), keep_last=1)
        assert latest_train_state(tmp_path) == tmp_path / "step-00000001"
        assert not saver.has_failed
        saver.finish()
        saver.start(tmp_path, 4, state_at(4), keep_last=1)
    assert latest_train_state(tmp_path) == tmp_path / "step-00000004"


def test_a_failure_shows_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with BackgroundSave() as saver:
        saver.start(tmp_path / "file", 1, state_at(1), keep_last=1)
        saver.wait_copied()
        while not saver.has_failed:
            threading.Event().wait(0.01)
        with pytest.raises(CheckpointError, match="cannot be written"):
            saver.finish()

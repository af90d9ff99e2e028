"""Runs the command line in this process, as a user would see it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostro.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def ostro(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`ostro("encode", folder, stdin=b"...")` runs the command and gives its outcome."""

    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made by `ostro init`: tiny, nested, FP8."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    with pytest.raises(SystemExit) as stop:
        main(["init", str(folder), "--vocab-size", "2048"])
    assert stop.value.code == 0
    return folder

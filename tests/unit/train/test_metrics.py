"""metrics.jsonl after a resume, trackers that are not installed, and the lines where there is no terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ostro.errors import OstroError
from ostro.train.metrics import MetricsFile, live_line, open_log, open_trackers
from ostro.train.options import TrackOptions


def rows(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_rows_after_the_checkpoint_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.9}\n{"step": 30, "loss": 0.8}\n{"step": 4')
    file = MetricsFile(path, resumed_step=20)
    file.log(30, {"loss": 0.7})
    file.close()
    assert rows(path) == [10, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.7


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    MetricsFile(path, resumed_step=0).close()
    assert path.read_text() == ""


def test_tensorboard_receives_rows_and_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, TrackOptions(backends=("tensorboard",)), resumed_step=0) as log:
        log.row(1, {"loss": 2.0})
        log.evaluation(1, "dev", {"nDCG@10": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [2.0]
    assert [event.value for event in events.Scalars("dev/nDCG@10")] == [0.5]


def test_without_a_terminal_a_line_stays_a_line() -> None:
    out = io.StringIO()
    with live_line(Console(file=out, width=20), num_steps=2, first_step=0) as line:
        line.show(1, {"loss": 0.5, "tokens_per_s": 1234.0, "learning_rate": 1e-3})
        line.say("step 1  runs/[b]/weights  nDCG@10 0.500  Recall@10 0.700")
    assert out.getvalue().splitlines() == [
        "step 1  loss 0.5000  1,234 tokens/s  lr 1.00e-03",
        "step 1  runs/[b]/weights  nDCG@10 0.500  Recall@10 0.700",
    ]


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_a_missing_tracker_names_its_extra(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(OstroError, match=rf"{backend}: not installed; run: pip install 'ostro\[track\]'"):
        open_trackers((backend,), folder=tmp_path, project="p")

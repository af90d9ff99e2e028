"""`ostro plan` as a user sees it: tables, JSON, and what it says when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

DEMO = ("plan", "vlm-demo", "--device", "cpu", "--memory", "4")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no run has made the demo's inputs, nor could a plan leave files unnoticed."""
    monkeypatch.chdir(tmp_path)


def test_a_plan_shows_what_it_rests_on_and_the_best_split_by_part(ostro: Command, tmp_path: Path) -> None:
    outcome = ostro(*DEMO, "--gpus", "2")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[1].endswith("3.0 M parameters; preset scenes, of which the run makes runs/vlm-demo-inputs/weights")
    title = next(number for number, line in enumerate(lines) if line.startswith("fits:"))
    assert lines[title] == "fits: 4 splits, best first, in MiB"
    header, *rows = lines[title + 1 : title + 6]
    assert header.split()[:6] == ["pp", "dp_replicate", "dp_shard", "tp", "holds", "if"]
    best = lines.index(next(line for line in lines if line.startswith("best:")))
    held = float(rows[0].split()[4].replace(",", ""))
    assert float(lines[-1].split()[-1].replace(",", "")) == pytest.approx(held, abs=0.1)
    assert [line.split()[0] for line in lines[best + 4 :]] == [
        *("vision", "projector", "embeddings", "language_model", "head", "all")
    ]
    assert list(tmp_path.iterdir()) == []


def test_json_has_every_split(ostro: Command) -> None:
    outcome = ostro(*DEMO, "--gpus", "4", "--json")
    found = json.loads(outcome.out)
    assert len(found["splits"]) == 10  # 4 = 2^2 over four axes
    assert {split["fits"] for split in found["splits"]} == {True, False}
    first = found["splits"][0]
    assert sum(first["bytes"].values()) == first["peak_bytes"] <= found["limit_bytes"]


def test_a_folder_is_planned_from_its_configuration(ostro: Command, weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "configuration"
    copy.mkdir()
    (copy / "config.json").write_bytes((weights / "config.json").read_bytes())
    for recipe in ("vlm-demo", "embed-demo"):
        outcome = ostro("plan", recipe, f"model.weights={copy}", "--gpus", "1", "--memory", "4")
        assert outcome.code == 0
        assert f"configuration of {copy}" in outcome.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("plan", "vlm-dmo", "--gpus", 1, "--memory", 80), 2, "nearest shipped recipe: vlm-demo"),
        (("plan", "vlm-demo", "--gpus", 0, "--memory", 80), 2, "error: --gpus: must be at least 1, got 0"),
        (("plan", "vlm-demo", "--gpus", 1, "--memory", -1), 2, "error: --memory: must be more than 0 GiB"),
        (("plan", "vlm-demo", "--gpus", 1), 2, "Missing option '--memory'"),
        (
            ("plan", "vlm-demo", "parallel.tp=3", "--gpus", 3, "--memory", 8),
            1,
            "error: parallel.tp: must divide the model's",
        ),
        (
            ("plan", "vlm-demo", "--gpus", 1, "--memory", 0.1),
            1,
            "error: --memory: nothing fits on 1 GPU; the nearest, pp 1",
        ),
    ],
)
def test_bad_input(ostro: Command, words: tuple[object, ...], code: int, message: str) -> None:
    outcome = ostro(*words)
    assert outcome.code == code
    assert message in outcome.err

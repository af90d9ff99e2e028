"""The guide "Train a search model on your own documents" runs as written, block after block, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from ostro.cli import main
from ostro.config import load_recipe
from ostro.train.recipe import KINDS
from tests.helpers.guides import blocks, code_of, refusals

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "train.md"

REFUSED = [
    ["train", "help.yaml", "loss.temprature=0.02"],
    ["train", "help.yaml", "output=other", "model.weights=small-wieghts"],
    ["train", "help.yaml", "loss.temperature=0.02"],
    ["evaluate", "small-weights", "--data", "help"],
]


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # the `ostro` command that was installed with this interpreter
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    assert len(code_of(GUIDE, "bash")) == 5
    for block in blocks(GUIDE):
        if block.language == "python":
            exec(block.text, names)
        elif block.language == "yaml":
            Path(block.name).write_text(block.text, encoding="utf-8")
        else:
            done = subprocess.run(["bash", "-ec", block.text], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert capsys.readouterr().out.strip() in names["documents"]
    assert numpy.load("queries.npy").shape == (2, 192)
    for run in ("help", "sharper"):
        assert Path(f"runs/{run}/report.html").is_file()
    scores = json.loads(Path("runs/help/result.json").read_text(encoding="utf-8"))
    assert scores["metrics"]["nDCG@3"] > scores["baselines"]["untrained"]["nDCG@3"]
    monkeypatch.setenv("RUNS", "elsewhere")
    assert load_recipe("3b.yaml", [], KINDS).output == "elsewhere/help-3b"
    for words in REFUSED:
        with pytest.raises(SystemExit):
            main(words)
        told = capsys.readouterr().err.splitlines()[-1]
        assert any(told.startswith(f"error: {shown}") for shown in refusals(GUIDE)), told

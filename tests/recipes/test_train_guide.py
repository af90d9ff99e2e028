"""The guide "Train a search model on your own documents" runs as written, block after block, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "train.md"
_BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # the `ostro` command that was installed with this interpreter
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    blocks = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    assert [language for language, _, _ in blocks].count("bash") == 5
    for language, name, text in blocks:
        if language == "python":
            exec(text, names)
        elif language == "yaml":
            Path(name).write_text(text, encoding="utf-8")
        else:
            done = subprocess.run(["bash", "-ec", text], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert capsys.readouterr().out.strip() in names["documents"]
    assert numpy.load("queries.npy").shape == (2, 192)
    for run in ("help", "sharper"):
        assert Path(f"runs/{run}/report.html").is_file()
    scores = json.loads(Path("runs/help/result.json").read_text(encoding="utf-8"))
    assert scores["metrics"]["nDCG@3"] > scores["baselines"]["untrained"]["nDCG@3"]

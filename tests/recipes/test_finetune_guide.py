"""The guide "Fine-tune a vision-language model" runs as written, block after block, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ostro.cli import main
from ostro.config import load_recipe
from ostro.train.recipe import KINDS, VlmRecipe
from tests.helpers.guides import blocks, code_of, refusals

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "finetune.md"

REFUSED = [
    ["train", "signals.yaml", "output=other", "model.freeze=[head]"],
    ["train", "signals.yaml", "output=other", "data.train=signals/trian.jsonl"],
    ["train", "signals.yaml", "output=other", "model.freze=[vision]"],
    ["train", "signals.yaml", "output=other", "model.weights=small-text"],
]


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # the `ostro` command that was installed with this interpreter
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    said = []
    for block in blocks(GUIDE):
        if block.language == "python":
            exec(block.text, names)
        elif block.language == "yaml":
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.name != "no-run":
            done = subprocess.run(["bash", "-ec", block.text], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
    assert len(said) == len(code_of(GUIDE, "bash")) - 1 == 3
    result = json.loads(Path("runs/signals/result.json").read_text(encoding="utf-8"))
    assert result["metrics"]["exact match"] >= 0.9 > result["baselines"]["question only"]["exact match"]
    assert said[-1].splitlines()[0] == "green"  # 100 % 3 is 1
    assert capsys.readouterr().out.strip() == "['blue']"


def test_what_the_guide_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code_of(GUIDE, "python")[0], {})
    (recipe,) = (block for block in blocks(GUIDE) if block.language == "yaml")
    Path(recipe.name).write_text(recipe.text, encoding="utf-8")
    for folder, layout in (("small-vlm", "nested"), ("small-text", "text-only")):
        with pytest.raises(SystemExit):
            main(["init", folder, "--vocab-size", "2048", "--layout", layout])
    capsys.readouterr()
    shown = refusals(GUIDE)
    assert len(shown) == len(REFUSED)
    for words, beginning in zip(REFUSED, shown, strict=True):
        with pytest.raises(SystemExit):
            main(words)
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"error: {beginning}"), told


def test_the_shipped_recipe_takes_the_paths_of_the_command_line() -> None:
    recipe = load_recipe("vlm-ministral3-3b", ["model.weights=here", "data.train=conversations.jsonl"], KINDS)
    assert isinstance(recipe, VlmRecipe)
    assert [source.path for source in recipe.data.train] == ["conversations.jsonl"]

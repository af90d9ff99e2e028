"""Inputs that a recipe makes for itself, and only where they are missing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ostro.errors import RecipeError
from ostro.train.prepare import prepare_inputs
from tests.helpers import runs, vlm_runs


def test_weights_and_data_are_made_once(tmp_path: Path) -> None:
    said = io.StringIO()
    recipe = vlm_runs.recipe(
        tmp_path,
        tmp_path / "run",
        prepare={"weights": {"size": "tiny", "vocab_size": 1500}, "dataset": "fashion"},
        data={"train": [{"path": str(tmp_path / "data" / "train.jsonl")}]},
    )
    prepare_inputs(recipe, Console(file=said, width=200))
    assert (tmp_path / "weights" / "tekken.json").is_file()
    assert {"train.jsonl", "dev.jsonl", "test.jsonl"} <= {path.name for path in (tmp_path / "data").iterdir()}
    told = said.getvalue().splitlines()
    assert told[0].endswith("weights: making random fp8 weights, tiny, nested")
    assert told[1].endswith("data: writing scenes of Fashion-MNIST photos (c) Zalando SE, MIT licence")
    before = (tmp_path / "weights" / "model.safetensors").stat().st_mtime_ns
    prepare_inputs(recipe, Console(file=said, width=200))
    assert len(said.getvalue().splitlines()) == len(told)
    assert (tmp_path / "weights" / "model.safetensors").stat().st_mtime_ns == before


def test_a_size_that_does_not_exist_is_named_by_its_key(tmp_path: Path) -> None:
    blocks = {"model": {"weights": str(tmp_path / "not-there")}, "prepare": {"weights": {"size": "huge"}}}
    recipe = runs.recipe(tmp_path, tmp_path / "run", **blocks)
    with pytest.raises(RecipeError, match=r"^prepare\.weights\.size: must be one of tiny"):
        prepare_inputs(recipe, Console(file=io.StringIO()))

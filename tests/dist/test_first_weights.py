"""What training begins from: the same bits however the ranks are laid out, and whatever was drawn on them before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ostro.checkpoint.create import create_weights
from ostro.parallel.options import ParallelOptions
from ostro.train import runtime
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from tests.helpers import runs, vlm_runs
from tests.helpers.ranks import RankPool
from tests.helpers.trainers import make_trainer

HELPERS: dict[str, Any] = {"embed": runs, "vlm": vlm_runs}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embed/` and `vlm/`, each with FP8 weights and data."""
    folder = tmp_path_factory.mktemp("first")
    for name, helper in HELPERS.items():
        helper.make_inputs(folder / name)
    return folder


def _recipe(inputs: Path, kind: str) -> EmbedRecipe | VlmRecipe:
    blocks = {"loss": {"learned_temperature": True}} if kind == "embed" else {}
    recipe: EmbedRecipe | VlmRecipe = HELPERS[kind].recipe(inputs / kind, inputs / "run", **blocks)
    return recipe


def _first_weights(group: dist.ProcessGroup | None, recipe: EmbedRecipe | VlmRecipe) -> dict[str, torch.Tensor]:
    """The master weights that this rank trains, whole."""
    runtime.set_seeds(group.rank() if group else 100)
    trainer = make_trainer(recipe)
    trainer.batches.close()  # type: ignore[attr-defined]
    weights = trainer.state().weights
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    ("kind", "axis"), [("embed", "dp_shard"), ("embed", "tp"), ("vlm", "dp_shard"), ("vlm", "tp"), ("vlm", "pp")]
)
def test_training_begins_from_the_weights_of_one_process(
    ranks: RankPool, inputs: Path, kind: str, axis: str
) -> None:
    """In bfloat16, so that what is float32 from the start could hold more of an FP8 weight than the others do."""
    recipe = _recipe(inputs, kind)
    expected = _first_weights(None, recipe)
    assert ("log_temperature" in expected) == (kind == "embed")
    split = recipe.model_copy(update={"parallel": ParallelOptions(**{axis: 2})})
    results = ranks.run(_first_weights, split)
    assert set().union(*results) == expected.keys()
    for weights in results:
        assert axis == "pp" or weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, expected[name]), name


def _create(group: dist.ProcessGroup | None, folder: Path) -> None:
    runtime.set_seeds(group.rank() if group else 100)
    create_weights(
        folder / str(group.rank() if group else "alone"),
        size="tiny",
        layout="nested",
        precision="fp8",
        vocab_size=1500,
        seed=3,
    )


def test_a_seed_makes_the_same_folder_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    _create(None, tmp_path)
    ranks.run(_create, tmp_path)
    files = {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    assert "model.safetensors" in files
    for rank in ("0", "1"):
        assert {file.name: file.read_bytes() for file in (tmp_path / rank).iterdir()} == files

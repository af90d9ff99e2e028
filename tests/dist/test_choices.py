"""Choices of what ranks hold whole: frozen parts beside `dp_shard`, and the vision side in a pipeline with `tp`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ostro.train.options import AnswerOptions, Part
from ostro.train.parts import part_of
from ostro.train.recipe import VlmRecipe
from tests.dist import test_pipeline, test_split_evaluation
from tests.dist.test_data_parallel import (
    _compare,
    _laid_out,
    _run,
    _steps,
    embed_recipe,
    inputs,
    losses,
    mixed_recipe,
    vlm_recipe,
)
from tests.dist.test_pipeline import inputs as stages
from tests.dist.test_split_evaluation import inputs as held_out
from tests.helpers.ranks import RankPool
from tests.helpers.trainers import make_trainer

__all__ = ["held_out", "inputs", "stages"]  # fixtures


@pytest.mark.parametrize(
    ("freeze", "recompute", "mesh"),
    [
        (["vision"], False, (1, 2)),
        (["vision", "projector", "embeddings"], True, (1, 2)),
        (["embeddings", "language_model"], False, (2, 2)),
        (["vision", "embeddings"], False, (1, 2, 2)),
    ],
    ids=str,
)
def test_frozen_parts_may_stay_whole(
    ranks: RankPool, inputs: Path, tmp_path: Path, freeze: list[str], recompute: bool, mesh: tuple[int, ...]
) -> None:
    """Some ranks see text alone in the first step, all of them in the second."""
    recipe = mixed_recipe(inputs, tmp_path)
    frozen = recipe.model.model_copy(update={"freeze": tuple(freeze), "activation_checkpointing": recompute})
    recipe = recipe.model_copy(update={"model": frozen})
    expected = _steps(None, recipe, 2)
    split = _whole_where_frozen(_laid_out(recipe, *mesh))
    _compare(ranks.run(_steps, split, 2, world_size=math.prod(mesh)), expected, is_split=True)


def _whole_where_frozen(recipe: Any) -> Any:
    parallel = recipe.parallel.model_copy(update={"shard_frozen": False})
    return recipe.model_copy(update={"parallel": parallel})


def _held(group: dist.ProcessGroup, recipe: VlmRecipe) -> tuple[dict[str, tuple[torch.dtype, bool]], float]:
    """Dtype of every weight of the trained model and whether it is split; and the loss of the second step."""
    trainer = make_trainer(recipe)
    weights = dict(trainer._module.named_parameters())
    [_, row] = [trainer.train_step() for _ in range(2)]
    trainer.batches.close()  # type: ignore[attr-defined]
    return {name: (weight.dtype, isinstance(weight, DTensor)) for name, weight in weights.items()}, row["loss"]


@pytest.mark.parametrize("freeze", [("vision",), ("projector", "language_model")], ids=str)
def test_what_is_frozen_is_held_in_the_dtype_of_the_run(
    ranks: RankPool, inputs: Path, tmp_path: Path, freeze: tuple[Part, ...]
) -> None:
    model = {"weights": str(inputs / "vlm" / "weights"), "dtype": "bfloat16", "freeze": freeze}
    recipe = vlm_recipe(inputs, tmp_path, model=model)
    rows, _, _ = _steps(None, recipe, 2)
    for held, loss in ranks.run(_held, _whole_where_frozen(_laid_out(recipe, 1, 2))):
        for name, kind in held.items():
            assert kind == ((torch.bfloat16, False) if part_of(name) in freeze else (torch.float32, True)), name
        # bfloat16 products in batches of other sizes
        assert loss == pytest.approx(rows[1]["loss"], rel=0.01)


def test_a_run_with_whole_frozen_parts_goes_on_and_exports(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    """From one process to two ranks that hold the vision tower whole, and on to two that split it."""
    weights, blocks = str(inputs / "vlm" / "weights"), {"train": {"num_steps": 6, "evaluate_every": None}}
    blocks["model"] = {"weights": weights, "dtype": "float32", "freeze": ("vision", "projector")}
    recipes = [vlm_recipe(inputs, tmp_path / name, **blocks) for name in ("one", "parts")]
    one, parts = (recipe.model_copy(update={"evaluate": None, "test": None}) for recipe in recipes)
    _run(None, one, None)
    split = _laid_out(parts, 1, 2)
    assert "Stopped after step 2 of 6" in _run(None, parts, 2)
    assert "Stopped after step 4 of 6" in ranks.run(_run, _whole_where_frozen(split), 4)[-1]
    assert "continuing after step 4 of 6" in ranks.run(_run, split, None)[0]
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    exported, expected = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("parts", "one"))
    frozen = [name for name in exported if "vision_tower" in name]
    assert frozen
    assert all(torch.equal(exported[name], expected[name]) for name in frozen)


@pytest.mark.parametrize(
    ("sizes", "freeze"),
    [
        # on the last stage nothing is left to FSDP
        ({"dp_shard": 2, "shard_frozen": False}, ("embeddings", "language_model", "head")),
        ({"dp_shard": 2, "shard_frozen": False}, ("vision",)),
        ({"tp": 2, "tp_vision": True}, ()),
    ],
    ids=str,
)
def test_a_pipeline_has_the_same_choices(
    ranks: RankPool, stages: Path, tmp_path: Path, sizes: dict[str, Any], freeze: tuple[str, ...]
) -> None:
    recipe = test_pipeline.mixed_recipe(stages, tmp_path, is_tied=False, freeze=freeze)
    results = ranks.run(_steps, test_pipeline._laid_out(recipe, dp_replicate=1, **sizes), 2, world_size=4)
    test_pipeline._compare(results, _steps(None, recipe, 2), is_split=True)


@pytest.mark.parametrize(
    ("sizes", "freeze"),
    [({"dp_shard": 2, "shard_frozen": False}, ("vision",)), ({"tp": 2, "tp_vision": True}, ())],
    ids=str,
)
def test_answers_are_those_of_one_process(
    ranks: RankPool, held_out: Path, tmp_path: Path, sizes: dict[str, Any], freeze: tuple[Part, ...]
) -> None:
    """Between steps: with pictures and without on one rank, without on the other."""
    model = {"weights": str(held_out / "vlm" / "weights"), "dtype": "float32", "freeze": freeze}
    recipe = vlm_recipe(held_out, tmp_path, model=model)
    path = held_out / "vlm" / "data" / "held_out.jsonl"
    options = AnswerOptions(path=str(path), max_new_tokens=5, batch_samples=2)
    rows, reports = test_split_evaluation._answers(None, recipe, options)
    split = test_split_evaluation.laid_out(recipe, sizes)
    for rank_rows, rank_reports in ranks.run(test_split_evaluation._answers, split, options):
        assert [report.answers for report in rank_reports] == [report.answers for report in reports]
        assert [row["loss"] for row in rank_rows] == pytest.approx([row["loss"] for row in rows], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "parallel", "message"),
    [
        ("embed", {"tp_vision": True}, "parallel.tp_vision: an embedder has no vision tower; leave it out"),
        ("embed", {"shard_frozen": False}, "parallel.shard_frozen: nothing of an embedder is frozen; leave it out"),
        ("vlm", {"shard_frozen": False}, "parallel.shard_frozen: is false, but model.freeze names no part; name one"),
    ],
)
def test_choices_without_an_effect_are_refused(
    inputs: Path, tmp_path: Path, kind: str, parallel: dict[str, bool], message: str
) -> None:
    make = embed_recipe if kind == "embed" else vlm_recipe
    with pytest.raises(ValueError, match=message):
        make(inputs, tmp_path, parallel=parallel)

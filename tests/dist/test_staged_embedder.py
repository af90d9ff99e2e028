"""An embedder in a pipeline: every step is the one that a single process takes with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ostro.errors import RecipeError
from ostro.models.backbone import empty_encoder_backbone
from ostro.parallel.options import ParallelOptions
from ostro.parallel.pipeline import plan_stages
from ostro.parallel.staged_embedder import StagedEmbedder
from ostro.train.recipe import EmbedRecipe
from tests.dist.test_data_parallel import _run, _steps, embed_recipe, losses
from tests.dist.test_pipeline import INTERLEAVED, _compare, with_four_layers
from tests.helpers import runs
from tests.helpers.ranks import RankPool

LEARNED = {"symmetric": True, "learned_temperature": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embed/`, with `weights` of three layers and `four` of four."""
    folder = tmp_path_factory.mktemp("staged")
    runs.make_inputs(folder / "embed")
    with_four_layers(folder / "embed" / "weights", folder / "embed" / "four")
    return folder


def laid_out(recipe: EmbedRecipe, **sizes: Any) -> EmbedRecipe:
    return recipe.model_copy(update={"parallel": ParallelOptions(**{"pp": 2, "dp_replicate": 1, **sizes})})


@pytest.mark.parametrize(
    "sizes",
    [{}, {"pp": 3}, {"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, INTERLEAVED],
    ids=["pp 2", "pp 3", "dp_replicate", "dp_shard", "tp", "interleaved"],
)
def test_steps_are_those_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    """The fourth step has three queries; a learned temperature is on all stages."""
    weights = "four" if "schedule" in sizes else "weights"
    model = {"weights": str(inputs / "embed" / weights), "dtype": "float32", "activation_checkpointing": True}
    recipe = embed_recipe(inputs, tmp_path, loss=LEARNED, model=model)
    expected = _steps(None, recipe, 4)
    options = laid_out(recipe, **sizes)
    num_ranks = options.parallel.pp * options.parallel.dp_replicate * options.parallel.dp_shard * options.parallel.tp
    results = ranks.run(_steps, options, 4, world_size=num_ranks)
    assert all(len(own) < len(expected[1]) for _, own, _ in results)
    _compare(results, expected, is_split=bool({"dp_shard", "tp"} & sizes.keys()))


def test_a_run_exports_what_it_trained(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    """It begins in two stages, goes on in one process, and ends in two stages of two ranks."""
    blocks = {"loss": LEARNED, "train": {"num_steps": 6, "evaluate_every": 3}}
    whole, parts = (embed_recipe(inputs, tmp_path / name, **blocks) for name in ("whole", "parts"))
    _run(None, whole, None)
    ranks.run(_run, laid_out(parts), 2, world_size=2)
    _run(None, parts, 4)
    shown, *_ = ranks.run(_run, laid_out(parts, dp_shard=2), None, world_size=4)
    assert "continuing after step 4 of 6" in shown
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    exported, expected = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("parts", "whole"))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():  # 2^-8: a value beside the middle of two is rounded the other way
        torch.testing.assert_close(exported[name], tensor, rtol=2**-7, atol=1e-6)


def _with_dropout(group: dist.ProcessGroup, weights: str) -> str:
    backbone = empty_encoder_backbone(weights, pooling="avg", extract_submodel=None, dtype=torch.float32)
    backbone.config.attention_dropout = 0.1
    with pytest.raises(RecipeError) as caught:
        StagedEmbedder(backbone, plan_stages(backbone.config, 1), group)
    return str(caught.value)


def test_a_model_that_draws_random_numbers_is_refused(ranks: RankPool, inputs: Path) -> None:
    told = ranks.run(_with_dropout, str(inputs / "embed" / "weights"), world_size=1)
    assert told == ["parallel.pp: needs a model whose attention_dropout is 0, got 0.1; set it to 0"]

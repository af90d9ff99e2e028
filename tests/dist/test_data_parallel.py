"""Ranks that share the batches of a run: every step is the one that a single process takes on the whole batch."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ostro.checkpoint.train_state import latest_train_state
from ostro.errors import OstroError
from ostro.parallel.collectives import sum_gradients
from ostro.parallel.mesh import build_mesh
from ostro.parallel.options import ParallelOptions
from ostro.train import embed, vlm
from ostro.train.export_run import export_checkpoint
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from ostro.train.trainer import Trainer
from tests.helpers import runs, vlm_runs
from tests.helpers.ranks import RankPool
from tests.helpers.trainers import make_trainer
from tests.unit.data.files import write_jsonl

Steps = tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]

# A large eps: the first step of Adam is else the sign of the gradient, also where that is rounding noise around 0.
OPTIMIZER = {"learning_rate": 1e-3, "eps": 1e-3}
MESHES = pytest.mark.parametrize(
    ("replicate", "shard", "tp"),
    [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)],
)
FLOAT32 = {"optimizer": OPTIMIZER, "schedule": {"warmup_steps": 0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embed/` and `vlm/`, each with weights and data."""
    folder = tmp_path_factory.mktemp("ranks")
    runs.make_inputs(folder / "embed")
    vlm_runs.make_inputs(folder / "vlm")
    data, colours = folder / "vlm" / "data", list(vlm_runs.COLOURS)
    texts = [vlm_runs.text_row(number) for number in range(12)]
    pictures = [vlm_runs.picture_row(data, 200 + number, colours[number % 3]) for number in range(4)]
    # steps of 8 samples: ranks that see text only beside ranks that see pictures, then text only everywhere
    write_jsonl(data / "mixed.jsonl", [*texts[:4], *pictures, *texts[4:]])
    return folder


def embed_recipe(inputs: Path, output: Path, **blocks: dict[str, Any]) -> EmbedRecipe:
    """33 training queries, 10 in a batch: the fourth has 3, which leave one of four ranks without."""
    model = {"weights": str(inputs / "embed" / "weights"), "dtype": "float32"}
    settings = {**FLOAT32, "model": model, "data": {"global_batch_queries": 10}, **blocks}
    return runs.recipe(inputs / "embed", output, **settings)


def vlm_recipe(inputs: Path, output: Path, **blocks: dict[str, Any]) -> VlmRecipe:
    model = {"weights": str(inputs / "vlm" / "weights"), "dtype": "float32"}
    return vlm_runs.recipe(inputs / "vlm", output, **{**FLOAT32, "model": model, **blocks})


def mixed_recipe(inputs: Path, output: Path) -> VlmRecipe:
    path = str(inputs / "vlm" / "data" / "mixed.jsonl")
    return vlm_recipe(inputs, output, data={"train": [{"path": path}], "shuffle": False})


def _steps(group: dist.ProcessGroup | None, recipe: EmbedRecipe | VlmRecipe, num_steps: int) -> Steps:
    """Rows of the steps; then the weights, and the first moments, which are sums of the gradients."""
    trainer = make_trainer(recipe)
    rows = [trainer.train_step() for _ in range(num_steps)]
    trainer.batches.close()  # type: ignore[attr-defined]
    state = trainer.state()
    moments = {name: _whole(moment["exp_avg"]) for name, moment in state.optimizer.items()}
    return rows, {name: _whole(weight) for name, weight in state.weights.items()}, moments


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _laid_out(recipe: EmbedRecipe | VlmRecipe, replicate: int, shard: int, tp: int = 1) -> EmbedRecipe | VlmRecipe:
    """The recipe with its ranks on a mesh."""
    return recipe.model_copy(update={"parallel": ParallelOptions(dp_replicate=replicate, dp_shard=shard, tp=tp)})


def _compare(results: list[Steps], expected: Steps, *, is_split: bool = False) -> None:
    """1e-5: float32 sums in another order. Split weights: torch sums the norm of 288,000 entries in float32 on the CPU, which
    is off by 3e-5 where one process does it (float64 norms agree to 3e-7); clipping hands that on to the gradients."""
    rows, weights, moments = expected
    tolerance = 5e-5 if is_split else 1e-5
    for rank_rows, rank_weights, rank_moments in results:
        for row, rank_row in zip(rows, rank_rows, strict=True):
            norm, rank_norm = row["grad_norm"], rank_row["grad_norm"]
            assert rank_norm == pytest.approx(norm, rel=tolerance)
            assert {**rank_row, "grad_norm": norm} == pytest.approx(row, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(rank_weights[name], weight, rtol=1e-5, atol=1e-6)
            scale = moments[name].abs().max().item()
            torch.testing.assert_close(rank_moments[name], moments[name], rtol=0, atol=tolerance * scale + 1e-10)
    for rank_rows, rank_weights, _ in results[1:]:
        assert rank_rows == results[0][0]
        assert all(torch.equal(weight, results[0][1][name]) for name, weight in rank_weights.items())


@MESHES
def test_embedding_steps_are_those_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, replicate: int, shard: int, tp: int
) -> None:
    recipe = embed_recipe(inputs, tmp_path, loss={"symmetric": True, "learned_temperature": True})
    expected = _steps(None, recipe, 4)
    assert [row["num_tokens"] for row in expected[0]][3] < expected[0][0]["num_tokens"] / 2
    recipe = _laid_out(recipe, replicate, shard, tp)
    _compare(ranks.run(_steps, recipe, 4, world_size=replicate * shard * tp), expected, is_split=shard * tp > 1)


def test_accumulated_embedding_steps(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    recipe = embed_recipe(inputs, tmp_path, train={"accumulation_steps": 2})
    _compare(ranks.run(_steps, recipe, 2), _steps(None, recipe, 2))


@MESHES
def test_vision_language_steps_are_those_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, replicate: int, shard: int, tp: int
) -> None:
    recipe = vlm_recipe(inputs, tmp_path)
    expected = _steps(None, recipe, 2)
    recipe = _laid_out(recipe, replicate, shard, tp)
    _compare(ranks.run(_steps, recipe, 2, world_size=replicate * shard * tp), expected, is_split=shard * tp > 1)


@MESHES
def test_a_rank_may_see_text_alone(
    ranks: RankPool, inputs: Path, tmp_path: Path, replicate: int, shard: int, tp: int
) -> None:
    recipe = mixed_recipe(inputs, tmp_path)
    expected = _steps(None, recipe, 2)
    assert [row["num_images"] for row in expected[0]] == [4, 0]
    recipe = _laid_out(recipe, replicate, shard, tp)
    _compare(ranks.run(_steps, recipe, 2, world_size=replicate * shard * tp), expected, is_split=shard * tp > 1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("freeze", [["vision"], ["embeddings", "language_model"]])
def test_a_split_model_with_frozen_parts(
    ranks: RankPool, inputs: Path, tmp_path: Path, freeze: list[str], tp: int
) -> None:
    """Also with its activations computed again."""
    recipe = mixed_recipe(inputs, tmp_path)
    frozen = recipe.model.model_copy(update={"freeze": tuple(freeze), "activation_checkpointing": True})
    recipe = recipe.model_copy(update={"model": frozen})
    expected = _steps(None, recipe, 2)
    assert expected[0][1]["num_images"] == 0
    _compare(ranks.run(_steps, _laid_out(recipe, 1, 2, tp), 2, world_size=2 * tp), expected, is_split=True)


@pytest.mark.parametrize(("shard", "tp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["embed", "vlm"])
def test_a_split_run_in_bfloat16_exports_what_it_trained(
    ranks: RankPool, inputs: Path, tmp_path: Path, kind: str, shard: int, tp: int
) -> None:
    make = embed_recipe if kind == "embed" else vlm_recipe
    model = {"weights": str(inputs / kind / "weights"), "dtype": "bfloat16"}
    blocks: dict[str, Any] = {"model": model} | ({"export": {"precision": "bf16"}} if kind == "vlm" else {})
    one, split = (make(inputs, tmp_path / name, **blocks) for name in ("one", "split"))
    _run(None, one, None)
    shown, _ = ranks.run(_run, _laid_out(split, 1, shard, tp), None)
    assert "before training" in shown
    assert "step 3  " in shown
    # bfloat16 products in batches of other sizes
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "one"), rel=0.03)
    checkpoint = latest_train_state(tmp_path / "split" / "checkpoints")
    assert checkpoint is not None
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    again = tmp_path / "again"
    assert export_checkpoint(checkpoint, again) == 6
    exported, loaded = (load_file(folder / "model.safetensors") for folder in (tmp_path / "split" / "weights", again))
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)


def _unreduced(group: dist.ProcessGroup, recipe: EmbedRecipe) -> Steps:
    trainer = make_trainer(recipe)
    trainer.update = lambda num_tokens: {}  # type: ignore[method-assign]
    trainer.train_step()
    gradients = {name: weight.grad.clone() for name, weight in trainer._weights.items() if weight.grad is not None}
    trainer.batches.close()  # type: ignore[attr-defined]
    return [], {}, gradients


def test_a_rank_alone_has_another_gradient(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    recipe = embed_recipe(inputs, tmp_path)
    one, other = (result[2] for result in ranks.run(_unreduced, recipe))
    name = "backbone.layers.0.mlp.up_proj.weight"
    assert (one[name] - other[name]).abs().max() > 0.1 * one[name].abs().max()


def _summed(group: dist.ProcessGroup) -> list[torch.Tensor | None]:
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 2, 4)]
    weights[0].grad = torch.full((3,), 1.0 + group.rank())
    if group.rank() == 1:
        weights[2].grad = torch.ones(4)
    sum_gradients(weights, group)
    return [weight.grad for weight in weights]


def test_gradients_are_summed_where_any_rank_has_one(ranks: RankPool) -> None:
    for first, second, third in ranks.run(_summed):
        assert first.tolist() == [3.0, 3.0, 3.0]
        assert second is None
        assert third.tolist() == [1.0, 1.0, 1.0, 1.0]


def _run(group: dist.ProcessGroup | None, recipe: EmbedRecipe | VlmRecipe, stop_after: int | None) -> str:
    """A whole run, which a full disk may end after some steps; what it printed, or the error."""
    out = io.StringIO()
    loop: Any = embed.EmbedTrainer if isinstance(recipe, EmbedRecipe) else vlm.VlmTrainer
    original = loop.train_step

    def train_step(trainer: Trainer) -> dict[str, float]:
        with trainer.ranks.agreed():
            if trainer.step == stop_after and trainer.ranks.rank == trainer.ranks.world_size - 1:
                raise OstroError("asked to stop here")
        row: dict[str, float] = original(trainer)
        return row

    loop.train_step = train_step
    try:
        run: Any = embed.run if isinstance(recipe, EmbedRecipe) else vlm.run
        run(recipe, console=Console(file=out, width=120))
    except OstroError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.train_step = original
    return out.getvalue()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", ["embed", "vlm"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 1)),
        ((1, 1), (1, 2)),
        ((2, 1), (2, 2)),
        ((1, 2), (1, 1)),
        ((1, 4), (1, 2)),
        ((1, 1, 2), (2, 1)),
        ((1, 2), (1, 2, 2)),
        ((1, 2, 2), (1, 1)),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: RankPool, inputs: Path, tmp_path: Path, kind: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    make = embed_recipe if kind == "embed" else vlm_recipe
    blocks = {"train": {"num_steps": 6, "evaluate_every": None}}
    whole, parts = (make(inputs, tmp_path / name, **blocks) for name in ("whole", "parts"))
    whole, parts = (recipe.model_copy(update={"evaluate": None, "test": None}) for recipe in (whole, parts))

    def run(recipe: EmbedRecipe | VlmRecipe, mesh: tuple[int, ...], stop_after: int | None = None) -> list[str]:
        recipe, world_size = _laid_out(recipe, *mesh), math.prod(mesh)
        if world_size == 1:
            return [_run(None, recipe, stop_after)]
        return ranks.run(_run, recipe, stop_after, world_size=world_size)

    run(whole, (1, 1))
    *others, told = run(parts, before, 3)
    assert told.startswith("OstroError: asked to stop here. Stopped after step 3 of 6 and saved")
    assert all(other == f"ToldElsewhere: rank {len(others)} failed and tells why" for other in others)
    assert f"continuing after step 3 of 6" in run(parts, after)[0]
    assert (tmp_path / "parts" / "weights" / "model.safetensors").is_file()
    # float32 sums in another order
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_wrong_row_on_one_rank_stops_all_with_a_checkpoint(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    data, colours = tmp_path / "data", list(vlm_runs.COLOURS)
    rows = [vlm_runs.picture_row(data, number, colours[number % 3]) for number in range(24)]
    write_jsonl(data / "train.jsonl", rows)
    (data / "images" / "22.png").unlink()  # in the share of rank 1 of the third step
    blocks = {"data": {"train": [{"path": str(data / "train.jsonl")}], "shuffle": False}, "train": {"save_every": None}}
    recipe = vlm_recipe(inputs, tmp_path / "run", **blocks).model_copy(update={"evaluate": None, "test": None})
    other, told = ranks.run(_run, recipe, None)
    assert other == "ToldElsewhere: rank 1 failed and tells why"
    assert told.startswith(f"DataError: {data}") or told.startswith(f"OstroError: {data}")
    assert "22.png" in told
    assert f"Stopped after step 2 of 6 and saved {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}" in told
    vlm_runs.picture_row(data, 22, "red")
    shown, _ = ranks.run(_run, recipe, None)
    assert "continuing after step 2 of 6" in shown


def _signalled(group: dist.ProcessGroup, recipe: EmbedRecipe) -> str:
    """A run in which only the last rank receives a signal, during its third step."""
    original = embed.EmbedTrainer.train_step

    def train_step(trainer: embed.EmbedTrainer) -> dict[str, float]:
        if trainer.step == 2 and group.rank() == group.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    embed.EmbedTrainer.train_step = train_step  # type: ignore[method-assign]
    try:
        return _run(group, recipe, None)
    finally:
        embed.EmbedTrainer.train_step = original  # type: ignore[method-assign]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    recipe = embed_recipe(inputs, tmp_path / "run").model_copy(update={"evaluate": None, "test": None})
    first, second = ranks.run(_signalled, _laid_out(recipe, 1, 2))
    stand = (
        f"received SIGTERM. Stopped after step 3 of 6 and saved {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}"
    )
    assert first.startswith(f"Stopped: {stand}")
    assert second.startswith(f"ToldElsewhere: {stand}")


def test_what_ranks_cannot_do_is_told_by_the_first(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    head = _laid_out(vlm_recipe(inputs, tmp_path / "head"), 1, 2)
    frozen = {"freeze": ("vision", "projector", "embeddings", "language_model")}
    head = head.model_copy(update={"model": head.model.model_copy(update=frozen)})
    few = vlm_recipe(inputs, tmp_path / "few", data={"global_batch_samples": 1})
    for recipe, message in (
        (head, "RecipeError: model.freeze: the head alone cannot be trained with parallel.dp_shard=2; leave another"),
        (few, "RecipeError: data.global_batch_samples: must be at least the number of ranks that share it, 2, got 1"),
        (_laid_out(few, 3, 1), "RecipeError: parallel.dp_replicate: the product of the sizes must be the number of"),
    ):
        told, silent = ranks.run(_run, recipe, None)
        assert told.startswith(message)
        assert silent == "ToldElsewhere: rank 0 failed and tells why"


def _elsewhere(group: dist.ProcessGroup, recipe: EmbedRecipe, folders: list[Path]) -> str:
    return _run(group, recipe.model_copy(update={"output": str(folders[group.rank()])}), None)


def test_ranks_that_see_other_checkpoints_are_told(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    blocks = {"train": {"num_steps": 2, "evaluate_every": None}}
    recipe = embed_recipe(inputs, tmp_path / "one", **blocks).model_copy(update={"evaluate": None, "test": None})
    _run(None, recipe, None)
    told, silent = ranks.run(_elsewhere, recipe, [tmp_path / "one", tmp_path / "other"])
    assert told.startswith(f"CheckpointError: output: {tmp_path / 'one'} holds other checkpoints for some ranks (")
    assert silent.startswith("ToldElsewhere: ")

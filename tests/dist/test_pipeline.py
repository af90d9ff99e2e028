"""Stages of a pipeline: every step is the one that a single process takes with the whole model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from safetensors.torch import load_file, save_file

from ostro.checkpoint.create import create_weights
from ostro.checkpoint.train_state import latest_train_state
from ostro.data.conversation_collate import ConversationBatch, blank_batch, filled
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import use_packed_attention
from ostro.parallel.collectives import sum_over_ends
from ostro.parallel.pipeline import Stage, fitting_number, keep_stages, own_stages, plan_stages, run_stages, running
from ostro.parallel.options import ParallelOptions
from ostro.plan.live import LiveBytes
from ostro.train.export_run import export_checkpoint
from ostro.train.recipe import VlmRecipe
from ostro.train.vlm_loss import packed_loss, packed_states
from tests.dist.test_data_parallel import FLOAT32, Steps, _run, _steps, losses
from tests.helpers import runs as embed_runs
from tests.helpers import vlm_runs
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import vlm_config
from tests.unit.data.files import write_jsonl

Gradients = dict[str, torch.Tensor]

# images of each sample of each micro-batch, step by step; with them goes the length
STEPS = [[[1, 0], [2], [0, 0], [0, 3]], [[0], [0], [0]], [[2, 1], [0, 0, 1], [1], [1]]]
_IMAGE = 10


def _whole(is_tied: bool) -> Mistral3FP8VLMForConditionalGeneration:
    torch.manual_seed(5)
    config = vlm_config(tie_word_embeddings=is_tied, num_hidden_layers=5)
    model = Mistral3FP8VLMForConditionalGeneration(config).train()
    use_packed_attention(model)
    return model


def _batch(counts: list[int], generator: torch.Generator) -> ConversationBatch:
    """Samples of random tokens, the images of a sample (28 x 56 pixels, so two tokens) at its beginning."""
    ids = [[_IMAGE, _IMAGE] * count + torch.randint(14, 96, (7,), generator=generator).tolist() for count in counts]
    flat = torch.tensor(sum(ids, []))
    labels = torch.where(flat == _IMAGE, -100, flat.roll(-1))
    num_images = sum(counts)
    return ConversationBatch(
        input_ids=flat,
        labels=labels,
        lengths=tuple(map(len, ids)),
        pixel_values=torch.randn(num_images, 3, 28, 56, generator=generator) if num_images else None,
        image_sizes=torch.tensor([[28, 56]] * num_images) if num_images else None,
        num_supervised=int((labels != -100).sum()),
    )


def _step(number: int) -> tuple[list[ConversationBatch], int]:
    """The micro-batches of a step, and their supervised tokens."""
    generator = torch.Generator().manual_seed(number)
    batches = [_batch(counts, generator) for counts in STEPS[number]]
    return batches, sum(batch.num_supervised for batch in batches)


def _expected(is_tied: bool) -> list[tuple[float, Gradients]]:
    model, results = _whole(is_tied), []
    for number in range(len(STEPS)):
        batches, num_supervised = _step(number)
        model.zero_grad()
        losses = [packed_loss(model, batch, num_supervised) for batch in batches]
        sum(losses).backward()
        results.append((sum(loss.item() for loss in losses), _gradients(model)))
    return results


def _gradients(model: torch.nn.Module) -> Gradients:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _on_stages(
    group: dist.ProcessGroup, is_tied: bool, schedule: str, stages_per_rank: int
) -> list[tuple[float, Gradients]]:
    model, results = _whole(is_tied), []
    stages = own_stages(model.config, group, stages_per_rank)
    keep_stages(model, stages)
    for number in range(len(STEPS)):
        batches, num_supervised = _step(number)
        needed = fitting_number(len(batches), num_ranks=group.size(), schedule=schedule)
        batches += [blank_batch(None)] * (needed - len(batches))
        length = max(batch.num_tokens for batch in batches)
        loss = partial(packed_loss, model, num_supervised=num_supervised)
        model.zero_grad()
        value = run_stages(
            model,
            stages,
            lambda stage, batch, received, loss=loss: (
                loss(batch, received=received) if stage.is_last else packed_states(model, batch, received)
            ),
            [filled(batch, length) for batch in batches],
            hidden_states=torch.empty(1, length, 32, device="meta"),
            group=group,
            schedule=schedule,
        )
        if is_tied:
            is_end = stages[0].is_first or stages[-1].is_last
            ends = [model.get_input_embeddings().weight.grad] if is_end else []
            sum_over_ends(ends, group)
        results.append((value, _gradients(model)))
    return results


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("num_ranks", "schedule", "stages_per_rank"),
    [(2, "1f1b", 1), (2, "gpipe", 1), (4, "1f1b", 1), (2, "interleaved", 2)],
)
def test_stages_give_the_gradients_of_the_whole_model(
    ranks: RankPool, is_tied: bool, num_ranks: int, schedule: str, stages_per_rank: int
) -> None:
    """Any mix of images, micro-batches of unequal content, and another length for every step."""
    expected = _expected(is_tied)
    results = ranks.run(_on_stages, is_tied, schedule, stages_per_rank, world_size=num_ranks)
    for (loss, gradients), *stages in zip(expected, *results, strict=True):
        assert sum(value for value, _ in stages) == pytest.approx(loss, rel=1e-6)
        assert set().union(*(own for _, own in stages)) == gradients.keys()
        for _, own in stages:
            for name, gradient in own.items():
                # float32 sums in another order
                scale = gradients[name].abs().max().item()
                torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-5 * scale + 1e-12)


@torch.no_grad()
def test_stages_one_after_the_other_are_the_whole_model() -> None:
    whole, ranks, states = _whole(True), [_whole(True), _whole(True)], None
    stages, (batch, *_), _ = plan_stages(whole.config, 4), *_step(0)
    for rank, model in enumerate(ranks):
        keep_stages(model, stages[rank::2])
    for stage in stages:
        with running(ranks[stage.index % 2], stage):
            states = packed_states(ranks[stage.index % 2], batch, states)
    torch.testing.assert_close(states, packed_states(whole, batch), rtol=0, atol=0)


def test_a_pipeline_takes_what_its_schedule_can_share_out() -> None:
    def taken(schedule: str, num_ranks: int) -> list[int]:
        return [fitting_number(number, num_ranks=num_ranks, schedule=schedule) for number in (1, 3, 5, 9, 17)]

    assert taken("1f1b", 2) == [2, 3, 5, 9, 17]
    assert taken("interleaved", 2) == [2, 3, 6, 10, 18]
    assert taken("interleaved", 8) == [8, 8, 8, 9, 18]


def _peaks(group: dist.ProcessGroup) -> list[int]:
    """Most bytes alive above those before, in steps of 4, 4 and 16 equal micro-batches."""
    model, found = _whole(False), []
    stages, batch = own_stages(model.config, group), _batch([0] * 40, torch.Generator().manual_seed(0))
    keep_stages(model, stages)

    def compute(stage: Stage, batch: ConversationBatch, received: torch.Tensor | None) -> torch.Tensor:
        return packed_loss(model, batch, 1, received) if stage.is_last else packed_states(model, batch, received)

    with LiveBytes() as live:
        for number in (4, 4, 16):
            before, travels = live.restart(), torch.empty(1, batch.num_tokens, 32, device="meta")
            batches = [batch] * number
            run_stages(model, stages, compute, batches, hidden_states=travels, group=group, schedule="1f1b")
            found.append(live.peak - before)
    return found


def test_memory_does_not_grow_with_the_number_of_micro_batches(ranks: RankPool) -> None:
    one_hidden_state = 280 * 32 * 4
    for _, four, sixteen in ranks.run(_peaks):
        assert sixteen < four + one_hidden_state


def _without_memory(group: dist.ProcessGroup) -> str:
    def compute(stage: Stage, batch: ConversationBatch, received: torch.Tensor | None) -> torch.Tensor:
        raise torch.OutOfMemoryError("too much for 8 GiB")

    model = _whole(True)
    stages, travels = plan_stages(model.config, 1), torch.empty(1, 1, 32, device="meta")
    keep_stages(model, stages)
    batches = [blank_batch(None)]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_stages(model, stages, compute, batches, hidden_states=travels, group=group, schedule="1f1b")
    return str(caught.value)


def test_a_lack_of_memory_is_told_as_such(ranks: RankPool) -> None:
    assert ranks.run(_without_memory, world_size=1) == ["too much for 8 GiB"]


def test_stages_have_about_the_same_work() -> None:
    def layers(num_stages: int, **sizes: int) -> list[int]:
        config = vlm_config(num_hidden_layers=12, **sizes)
        return [len(stage.layers) for stage in plan_stages(config, num_stages)]

    # a layer has 9,216 weights, the vision side 23,552, the head 32 for each entry of the vocabulary
    assert layers(2) == [5, 7]
    assert layers(2, vocab_size=2000) == [8, 4]
    assert layers(3, vocab_size=2000) == [5, 6, 1]
    assert layers(4, vocab_size=20_000) == [9, 1, 1, 1]
    assert layers(12) == [1] * 12


def with_four_layers(source: Path, folder: Path) -> None:
    """Weights of three text layers, and the third once more as a fourth."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    third = {name: tensor for name, tensor in tensors.items() if "language_model" in name and "layers.2." in name}
    tensors |= {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in third.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vlm/` with tied weights of three layers and data, `untied/` with weights whose head is its own; `4/` and
    `4-untied/` with four layers."""
    folder = tmp_path_factory.mktemp("pipeline")
    vlm_runs.make_inputs(folder / "vlm")
    create_weights(folder / "untied", size="tiny", layout="identity", precision="fp8", vocab_size=1500, seed=0)
    with_four_layers(folder / "vlm" / "weights", folder / "4")
    with_four_layers(folder / "untied", folder / "4-untied")
    data, colours = folder / "vlm" / "data", list(vlm_runs.COLOURS)
    texts = [vlm_runs.text_row(number) for number in range(14)]
    pictures = [vlm_runs.picture_row(data, 300 + number, colours[number % 3]) for number in range(6)]
    for number, row in enumerate(pictures[:2]):
        row["messages"][0]["content"][1:1] = [{"type": "image", "image": f"images/{302 + number}.png"}] * (number + 1)
    # steps of 8 samples: none, one, two or three pictures to a sample; then text only
    write_jsonl(data / "mixed.jsonl", [*texts[:4], *pictures[:2], *pictures[4:], *texts[4:]])
    return folder


def mixed_recipe(
    inputs: Path, output: Path, *, is_tied: bool = True, num_layers: int = 3, **model: Any
) -> VlmRecipe:
    """Two steps see all of the data, with other lengths; one process makes one micro-batch of each, a pipeline two."""
    names = {(3, True): "vlm/weights", (3, False): "untied", (4, True): "4", (4, False): "4-untied"}
    weights = inputs / names[num_layers, is_tied]
    data = {"train": [{"path": str(inputs / "vlm" / "data" / "mixed.jsonl")}], "shuffle": False}
    data |= {"max_tokens": 96, "micro_batch_tokens": 400}
    model = {"weights": str(weights), "dtype": "float32", **model}
    return vlm_runs.recipe(inputs / "vlm", output, model=model, data=data, **FLOAT32)


def _laid_out(recipe: VlmRecipe, **sizes: Any) -> VlmRecipe:
    return recipe.model_copy(update={"parallel": ParallelOptions(**{"pp": 2, **sizes})})


def _compare(results: list[Steps], expected: Steps, *, is_split: bool = False) -> None:
    """1e-5: float32 sums in another order. The gradient norm to 5e-5 where weights are split: see `test_data_parallel`;
    clipping hands that on to the gradients."""
    tolerance = 5e-5 if is_split else 1e-5
    rows, weights, moments = expected
    assert set().union(*(own for _, own, _ in results)) == weights.keys()
    for rank_rows, own_weights, own_moments in results:
        assert rank_rows == results[0][0]
        for row, rank_row in zip(rows, rank_rows, strict=True):
            norm = row["grad_norm"]
            assert rank_row["grad_norm"] == pytest.approx(norm, rel=tolerance)
            assert {**rank_row, "grad_norm": norm} == pytest.approx(row, rel=1e-5)
        for name, weight in own_weights.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
            scale = moments[name].abs().max().item()
            torch.testing.assert_close(own_moments[name], moments[name], rtol=0, atol=tolerance * scale + 1e-10)
    for name in weights:
        first, *others = [own[name] for _, own, _ in results if name in own]
        assert all(torch.equal(other, first) for other in others), name


INTERLEAVED = {"schedule": "interleaved", "stages_per_rank": 2, "dp_replicate": 1}
MESHES = pytest.mark.parametrize(
    "sizes",
    [
        {"dp_replicate": 1},
        {"dp_replicate": 2},
        {"dp_shard": 2, "dp_replicate": 1},
        {"tp": 2, "dp_replicate": 1},
        INTERLEAVED,
        {**INTERLEAVED, "dp_shard": 2},
        {**INTERLEAVED, "tp": 2},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items() if value != 1),
)


@MESHES
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_steps_are_those_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, sizes: dict[str, Any], is_tied: bool
) -> None:
    """Text-only samples and steps, several images to a sample, and another length for every step."""
    recipe = mixed_recipe(inputs, tmp_path, is_tied=is_tied, num_layers=4 if "stages_per_rank" in sizes else 3)
    expected = _steps(None, recipe, 2)
    assert [row["num_images"] for row in expected[0]] == [7, 0]
    world_size = 2 * sizes["dp_replicate"] * sizes.get("dp_shard", 1) * sizes.get("tp", 1)
    results = ranks.run(_steps, _laid_out(recipe, **sizes), 2, world_size=world_size)
    assert all(len(own) < len(expected[1]) for _, own, _ in results)
    _compare(results, expected, is_split=bool({"dp_shard", "tp"} & sizes.keys()))


@pytest.mark.parametrize(
    "sizes",
    [{"schedule": "gpipe"}, {"dp_shard": 2, "dp_replicate": 1}, {**INTERLEAVED, "dp_shard": 2}],
    ids=["gpipe", "dp_shard", "interleaved"],
)
@pytest.mark.parametrize(
    "freeze",
    [("vision",), ("embeddings", "language_model", "head"), ("vision", "projector", "embeddings", "language_model")],
    ids=["vision", "all but the vision side", "all but the head"],
)
def test_frozen_parts(
    ranks: RankPool, inputs: Path, tmp_path: Path, sizes: dict[str, Any], freeze: tuple[str, ...]
) -> None:
    """Also stages on which nothing trains, and activations computed again."""
    only_head = "head" not in freeze and len(freeze) == 4
    num_layers = 4 if "stages_per_rank" in sizes else 3
    model = {"freeze": freeze, "activation_checkpointing": True}
    recipe = mixed_recipe(inputs, tmp_path, is_tied=False, num_layers=num_layers, **model)
    if only_head and "dp_shard" in sizes:
        told, *_ = ranks.run(_run, _laid_out(recipe, **sizes), None, world_size=4)
        assert told.startswith("RecipeError: model.freeze: the head alone cannot be trained with parallel.dp_shard=2")
        return
    results = ranks.run(_steps, _laid_out(recipe, **sizes), 2, world_size=4)
    _compare(results, _steps(None, recipe, 2), is_split="dp_shard" in sizes)


def test_a_run_in_bfloat16_exports_what_it_trained(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    blocks = {"model": {"weights": str(inputs / "vlm" / "weights")}, "export": {"precision": "bf16"}}
    one, split = (vlm_runs.recipe(inputs / "vlm", tmp_path / name, **blocks) for name in ("one", "split"))
    _run(None, one, None)
    shown, _ = ranks.run(_run, _laid_out(split), None)
    assert "before training" in shown
    assert "step 3  " in shown
    # bfloat16 products in batches of other sizes
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "one"), rel=0.03)
    checkpoint = latest_train_state(tmp_path / "split" / "checkpoints")
    assert checkpoint is not None
    assert export_checkpoint(checkpoint, tmp_path / "again") == 6
    exported, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("split/weights", "again"))
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)


def test_a_run_goes_on_with_another_split(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    """Two stages; one process; four stages on two ranks; two of two ranks that split their weights; the same, split by
    layer."""
    blocks = {"train": {"num_steps": 8, "evaluate_every": None, "save_every": None}}
    model = {"weights": str(inputs / "4"), "dtype": "float32"}
    whole, parts = (
        vlm_runs.recipe(inputs / "vlm", tmp_path / name, model=model, **FLOAT32, **blocks).model_copy(
            update={"evaluate": None, "test": None}
        )
        for name in ("whole", "parts")
    )
    _run(None, whole, None)
    splits = ({}, None, INTERLEAVED, {"dp_shard": 2, "dp_replicate": 1}, {"tp": 2, "dp_replicate": 1})
    for sizes, stop in zip(splits, (1, 2, 4, 6, None), strict=True):
        if sizes is None:
            shown = [_run(None, parts, stop)]
        else:
            shown = ranks.run(_run, _laid_out(parts, **sizes), stop, world_size=4 if {"dp_shard", "tp"} & sizes.keys() else 2)
        if stop is not None:
            assert f"asked to stop here. Stopped after step {stop} of 8 and saved" in shown[-1]
    assert "continuing after step 6 of 8" in shown[0]
    # float32 sums in another order
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    exported, expected = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("parts", "whole"))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.bfloat16:  # 2^-8: a value beside the middle of two is rounded the other way
            torch.testing.assert_close(exported[name], tensor, rtol=2**-7, atol=1e-6)


def test_what_a_pipeline_cannot_do_is_told(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(inputs, tmp_path)
    told, *silent = ranks.run(_run, _laid_out(recipe, pp=4), None, world_size=4)
    assert told == "RecipeError: parallel.pp: must be at most the model's num_hidden_layers, 3, got 4"
    assert set(silent) == {"ToldElsewhere: rank 0 failed and tells why"}
    told, *silent = ranks.run(_run, _laid_out(recipe, **INTERLEAVED), None)
    assert told.startswith("RecipeError: parallel.stages_per_rank: must be at most 1, as parallel.pp=2 shares the mo")
    assert set(silent) == {"ToldElsewhere: rank 0 failed and tells why"}

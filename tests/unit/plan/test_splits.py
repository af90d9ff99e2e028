"""Plans of known models: counts of weights, every split, the rules, the order, the traffic."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ostro.config import load_recipe
from ostro.errors import OstroError, RecipeError
from ostro.plan import splits
from ostro.plan.memory import Sizes, Split
from ostro.plan.releases import RELEASES, read_config
from ostro.plan.splits import GIB, cut_layers, make_plan, usages
from ostro.plan.traffic import step_traffic
from ostro.train.recipe import KINDS, VlmRecipe

LARGE = "vlm-mistral-medium-3.5-128b"


def sizes(name: str, *overrides: str) -> Sizes:
    recipe = load_recipe(name, overrides, KINDS)
    share = 0.5 if isinstance(recipe, VlmRecipe) else 0.0
    return Sizes(splits._settings(recipe, read_config(recipe)[0], "cuda", share))


@pytest.fixture(scope="module")
def large() -> Sizes:
    return sizes(LARGE)


def test_the_largest_release_has_the_weights_of_its_files(large: Sizes) -> None:
    """121.8 B in FP8, 1.61 B each for embedding and head, 2.49 B of vision and 0.18 B of projector."""
    counts = {part: weights.all / 1e9 for part, weights in large.counts(1).items()}
    assert counts == pytest.approx(
        {"language_model": 121.8, "embeddings": 1.61, "head": 1.61, "vision": 2.49, "projector": 0.18},
        rel=5e-3,
        abs=5e-3,
    )
    assert large.counts(1)["vision"].trained == 0


@pytest.mark.parametrize("release", RELEASES)
def test_the_weights_of_a_release_add_up_to_its_name(release: str) -> None:
    """The 3B counts its language model alone, of 3.4 B with the tied embedding."""
    counts = sizes("vlm-ministral3-3b", f"model.weights={release}").counts(1)
    billions = sum(weights.all for weights in counts.values()) / 1e9
    named = float(release.rpartition("-")[2].removesuffix("B"))
    assert named - 0.5 <= billions <= 1.3 * named


def test_a_rank_of_tp_has_its_share_of_the_text_and_all_of_the_vision(large: Sizes) -> None:
    whole, share = large.counts(1), large.counts(8)
    assert share["head"].all == whole["head"].all / 8
    assert share["vision"] == whole["vision"]
    # the norms stay whole
    assert share["language_model"].all == pytest.approx(whole["language_model"].all / 8, rel=2e-4)


def test_stages_have_all_layers_and_about_equal_weights(large: Sizes) -> None:
    stages = [stage for share in cut_layers(large, Split(pp=8), 4) for stage in share.stages]
    assert sum(stage.num_layers for stage in stages) == 88
    assert [stage.has_inputs for stage in stages] == [True] + [False] * 7
    assert [stage.has_head for stage in stages] == [False] * 7 + [True]
    # the vision side is worth two layers, the head one
    assert [stage.num_layers for stage in stages] == [9, 12, 11, 12, 11, 11, 12, 10]


def test_interleaved_stages_go_round_the_ranks() -> None:
    model = sizes(LARGE, "parallel.schedule=interleaved", "parallel.stages_per_rank=3")
    shares = cut_layers(model, Split(pp=4), 8)
    assert [len(share.stages) for share in shares] == [3] * 4
    assert sum(stage.num_layers for share in shares for stage in share.stages) == 88
    ends = [(stage.has_inputs, stage.has_head) for share in shares for stage in share.stages]
    # the first of the first rank, and the last of the last
    assert ends == [(True, False), *[(False, False)] * 10, (False, True)]
    assert len(cut_layers(model, Split(), 8)[0].stages) == 1


def test_schedules_trade_memory_for_idle_time() -> None:
    """A pipeline of 4 with 16 micro-batches."""
    overrides = ["parallel.pp=4", "data.global_batch_samples=16", "model.activation_checkpointing=false"]
    interleaved = ["parallel.schedule=interleaved", "parallel.stages_per_rank=2"]
    found = {}
    for name, keys in (("1f1b", []), ("gpipe", ["parallel.schedule=gpipe"]), ("interleaved", interleaved)):
        recipe = load_recipe("vlm-ministral3-3b", [*overrides, *keys], KINDS)
        plan = make_plan(recipe, num_gpus=4, memory_gib=1000)
        [found[name]] = plan.fitting
        assert found[name].num_micro_batches == 16
    peaks = {name: choice.needs.peak for name, choice in found.items()}
    assert peaks["1f1b"] < peaks["interleaved"] < peaks["gpipe"]
    idle = {name: choice.step.idle for name, choice in found.items()}
    assert idle == pytest.approx({"1f1b": 3 / 19, "gpipe": 3 / 19, "interleaved": 3 / 35})
    assert found["interleaved"].step.sent["pp"] == 2 * found["1f1b"].step.sent["pp"]
    open_recipe = load_recipe("vlm-ministral3-3b", interleaved, KINDS)
    rules = {split.pp: rule for split, rule in make_plan(open_recipe, num_gpus=2, memory_gib=1000).forbidden}
    assert rules[1].startswith("parallel.schedule: interleaved needs parallel.pp of at least 2")
    assert 2 not in rules


def test_every_split_is_tried_and_each_has_a_verdict() -> None:
    recipe = load_recipe("vlm-ministral3-3b", ["test.path=held-out.jsonl"], KINDS)
    plan = make_plan(recipe, num_gpus=8, memory_gib=80)
    tried = [choice.split for choice in (*plan.fitting, *plan.too_large)] + [split for split, _ in plan.forbidden]
    # 8 = 2^3 over four axes
    assert len(set(tried)) == len(tried) == math.comb(6, 3)
    times = [choice.step.seconds for choice in plan.fitting]
    assert times == sorted(times)
    assert all(choice.needs.peak <= plan.limit == 0.9 * 80 * GIB for choice in plan.fitting)
    assert all(choice.needs.peak > plan.limit for choice in plan.too_large)
    by_split = {choice.split: choice for choice in plan.fitting}
    # the recipe's own promise: one GPU of 80 GB holds it, and so do replicas
    replicas = by_split[Split(dp_replicate=8)]
    sharded = by_split[Split(dp_shard=8)]
    assert sharded.needs.peak < replicas.needs.peak / 3


def test_sizes_that_the_recipe_sets_stay() -> None:
    recipe = load_recipe("vlm-ministral3-3b", ["parallel.tp=2", "parallel.dp_replicate=-1"], KINDS)
    plan = make_plan(recipe, num_gpus=4, memory_gib=80)
    tried = [choice.split for choice in (*plan.fitting, *plan.too_large)]
    assert {split.tp for split in tried} == {2}
    assert {split.dp_shard for split in tried} == {1, 2}


def test_nothing_fits_names_the_nearest_and_what_helps() -> None:
    recipe = load_recipe("vlm-ministral3-3b", ["model.activation_checkpointing=false"], KINDS)
    with pytest.raises(
        OstroError, match=r"--memory: nothing fits on 1 GPU; the nearest.*activation_checkpointing=true"
    ):
        make_plan(recipe, num_gpus=1, memory_gib=80).require_fit()
    with pytest.raises(OstroError, match=r"nothing fits on 2 GPUs.*lower data.micro_batch_tokens"):
        make_plan(recipe, num_gpus=2, memory_gib=8).require_fit()
    large = load_recipe(LARGE, ["parallel.tp=8", "parallel.pp=8"], KINDS)
    make_plan(large, num_gpus=64, memory_gib=80).require_fit()
    narrow = load_recipe("vlm-ministral3-3b", ["parallel.tp=16"], KINDS)
    with pytest.raises(
        OstroError, match=r"^parallel.tp: must divide the model's num_key_value_heads, 8, got 16; no other"
    ):
        make_plan(narrow, num_gpus=16, memory_gib=80).require_fit()


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ([], {"num_gpus": 0}, "--gpus: must be at least 1, got 0"),
        ([], {"memory_gib": 0}, "--memory: must be more than 0"),
        ([], {"memory_gib": math.nan}, "--memory: must be more than 0"),
        ([], {"memory_gib": math.inf}, "--memory: must be more than 0"),
        ([], {"image_share": 1.5}, "--image-share: must be from 0 to 1"),
        ([], {"gpus_per_machine": 0}, "--gpus-per-machine: must be at least 1"),
        (["parallel.tp=3"], {}, "parallel.tp: the sizes given (tp 3) must divide the 8 ranks"),
        (["model.weights=somewhere"], {}, "model.weights: somewhere is no folder, and no model"),
    ],
)
def test_bad_input(overrides: list[str], arguments: dict[str, Any], message: str) -> None:
    recipe = load_recipe("vlm-ministral3-3b", overrides, KINDS)
    with pytest.raises(RecipeError) as error:
        make_plan(recipe, **{"num_gpus": 8, "memory_gib": 80, **arguments})
    assert str(error.value).startswith(message)


def test_traffic_of_replicas_is_two_gradients_and_of_shards_their_gathers() -> None:
    model = sizes("vlm-ministral3-3b")
    counts = model.counts(1)
    trained = sum(weights.trained for weights in counts.values())
    held = sum(weights.all for weights in counts.values())

    def sent(split: Split) -> dict[str, int]:
        step = step_traffic(model, split, num_micro_batches=3, num_tokens=8192, gpus_per_machine=8, num_passes=1)
        return {axis: size for axis, size in step.sent.items() if size}

    assert sent(Split(dp_replicate=4)) == {"dp_replicate": pytest.approx(2 * 3 / 4 * 4 * trained, rel=1e-6)}
    # forward: everything in bfloat16; backward: the text layers once more; gradients in float32, for each micro-batch
    each = 2 * (held + counts["language_model"].all) + 4 * trained
    assert sent(Split(dp_shard=4)) == {"dp_shard": pytest.approx(3 * 3 / 4 * each, rel=1e-6)}
    # two sums of a row per layer in the forward pass, the recomputed one and the backward pass
    row = 8192 * 3072 * 2
    assert sent(Split(tp=4)) == {"tp": pytest.approx(3 * 26 * 2 * 3 * 2 * 3 / 4 * row, rel=1e-6)}
    assert sent(Split(pp=2)) == {"pp": 2 * 3 * row}


def test_a_split_vision_side_is_divided_and_sends_its_patches() -> None:
    plain, split = (sizes("vlm-ministral3-3b", f"parallel.tp_vision={value}") for value in ("false", "true"))
    assert plain.counts(4)["vision"] == plain.counts(1)["vision"]
    # what stays whole: patch embedding and norms
    assert split.counts(4)["vision"].all == pytest.approx(plain.counts(1)["vision"].all / 4, rel=0.02)
    layers, text = split.counts(4)["language_model"], plain.counts(4)["language_model"]
    assert layers == text
    sent = [
        step_traffic(model, Split(tp=4), num_micro_batches=3, num_tokens=8192, gpus_per_machine=8, num_passes=1).sent
        for model in (plain, split)
    ]
    # of 24 layers two sums of a row in the forward pass alone, as the recipe freezes the tower
    patches = split.settings.num_patches * 1024 * 2
    assert sent[1]["tp"] - sent[0]["tp"] == pytest.approx(3 * 24 * 2 * 2 * 3 / 4 * patches, rel=1e-6)


def test_frozen_parts_that_stay_whole_are_not_gathered() -> None:
    split, whole = (sizes("vlm-ministral3-3b", f"parallel.shard_frozen={value}") for value in ("true", "false"))
    vision = split.counts(1)["vision"].all
    assert split.counts(1)["vision"].trained == 0
    sent = [
        step_traffic(model, Split(dp_shard=4), num_micro_batches=3, num_tokens=8192, gpus_per_machine=8, num_passes=1)
        for model in (split, whole)
    ]
    assert sent[0].sent["dp_shard"] - sent[1].sent["dp_shard"] == pytest.approx(3 * 3 / 4 * 2 * vision, rel=1e-6)
    held = [
        max(usages(model, Split(dp_shard=4), 3), key=lambda each: each.peak).ledger["vision", "weights"]
        for model in (split, whole)
    ]
    assert held == [4 * vision // 4, 2 * vision]


def test_a_pipeline_of_an_embedder_cuts_its_micro_batches() -> None:
    recipe = load_recipe("embed-demo", ["parallel.pp=2"], KINDS)
    [choice] = make_plan(recipe, num_gpus=2, memory_gib=8).fitting
    assert choice.num_micro_batches == 2
    assert choice.step.idle == pytest.approx(1 / 3)

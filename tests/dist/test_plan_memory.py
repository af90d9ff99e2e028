"""What `ostro plan` predicts is what ranks hold: within a tenth of the bytes of all tensors that live during a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ostro.parallel.mesh import AXES
from tests.helpers import plan_runs
from tests.helpers.ranks import RankPool

ONE = {"dp_replicate": 1}
INTERLEAVED = {**ONE, "pp": 2, "schedule": "interleaved", "stages_per_rank": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 M parameters in four layers; samples of about 270 tokens, 72 of them of a picture."""
    folder = tmp_path_factory.mktemp("plan")
    plan_runs.make_inputs(folder, size="scenes", vocab_size=2000, num_words=20, pixels=(336, 168))
    return folder


@pytest.mark.parametrize(
    ("kind", "parallel", "model"),
    [
        ("vlm", ONE, {}),
        ("vlm", ONE, {"activation_checkpointing": True}),
        ("vlm", ONE, {"dtype": "float32"}),
        ("vlm", ONE, {"freeze": ["vision", "embeddings"]}),
        ("vlm", {"dp_replicate": 2}, {}),
        ("vlm", {"dp_replicate": 1, "dp_shard": 2}, {"activation_checkpointing": True}),
        (
            "vlm",
            {"dp_replicate": 1, "dp_shard": 2, "shard_frozen": False},
            {"dtype": "float32", "freeze": ["vision", "embeddings"]},
        ),
        ("vlm", {"dp_replicate": 1, "tp": 2}, {}),
        ("vlm", {"dp_replicate": 1, "tp": 2}, {"activation_checkpointing": True}),
        ("vlm", {"dp_replicate": 1, "tp": 2, "tp_vision": True}, {}),
        ("vlm", {"dp_replicate": 2, "dp_shard": 2}, {}),
        ("vlm", {"dp_replicate": 1, "dp_shard": 2, "tp": 2}, {}),
        ("vlm", {**ONE, "pp": 2}, {}),
        ("vlm", {**ONE, "pp": 2}, {"activation_checkpointing": True}),
        ("vlm", {**ONE, "pp": 2, "schedule": "gpipe"}, {}),
        ("vlm", INTERLEAVED, {}),
        ("vlm", {**INTERLEAVED, "dp_shard": 2}, {}),
        ("embed", ONE, {}),
        ("embed", {"dp_replicate": 1, "dp_shard": 2}, {}),
        ("embed", {**ONE, "pp": 2}, {}),
    ],
)
def test_the_peak_is_predicted_within_a_tenth(
    ranks: RankPool, inputs: Path, kind: str, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    num_data_ranks = parallel.get("dp_replicate", 1) * parallel.get("dp_shard", 1)
    num_ranks = num_data_ranks * parallel.get("tp", 1) * parallel.get("pp", 1)
    blocks = {"parallel": parallel, "model": {"weights": str(inputs / "weights"), **model}}
    # three full micro-batches or more for each rank: the plan knows no others, and they meet gradients of those before
    data = {"micro_batch_tokens": 1024, "max_tokens": 512} if kind == "vlm" else {"micro_batch_tokens": 512}
    recipe = plan_runs.recipe(inputs, kind, num_samples=9 * num_data_ranks, data=data, **blocks)
    found = ranks.run(plan_runs.measured, recipe, world_size=num_ranks)
    for usage, rank in zip(plan_runs.predicted(recipe, num_ranks, found[0]), found, strict=True):
        assert usage.peak == pytest.approx(rank["live"], rel=0.1)

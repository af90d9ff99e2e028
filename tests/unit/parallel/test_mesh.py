"""Sizes of the mesh: what is left is filled in, and what cannot be is an error that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from ostro.errors import RecipeError
from ostro.parallel.mesh import AXES, axis_sizes, check_fits, data_rank
from ostro.parallel.options import ParallelOptions
from tests.helpers.tiny import text_config


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_what_is_left_is_replicated(world_size: int) -> None:
    sizes = {"pp": 1, "dp_replicate": world_size, "dp_shard": 1, "tp": 1}
    assert axis_sizes(ParallelOptions(), world_size) == sizes
    assert axis_sizes(ParallelOptions(dp_replicate=world_size), world_size) == sizes
    assert list(axis_sizes(ParallelOptions(dp_replicate=world_size, dp_shard=-1), world_size)) == list(sizes)


def test_what_is_left_is_split() -> None:
    assert axis_sizes(ParallelOptions(dp_replicate=2, dp_shard=-1), 8)["dp_shard"] == 4
    assert axis_sizes(ParallelOptions(dp_shard=4), 8)["dp_replicate"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_replicate": 0}, "parallel.dp_replicate: must be at least 1, or -1 for what is left of the ranks, got 0"),
        ({"dp_shard": -1}, "parallel.dp_shard: only one of dp_replicate and dp_shard can be -1; set the other"),
        ({"dp_replicate": 3}, "parallel.dp_replicate: the product of the sizes must be the number of ranks, 4, got"),
        ({"dp_replicate": 1}, "parallel.dp_replicate: the product of the sizes must be the number of ranks, 4, got"),
        ({"dp_shard": 3}, "parallel.dp_shard: the product of the sizes must be the number of ranks, 4, got"),
        ({"tp": 3}, "parallel.tp: the product of the sizes must be the number of ranks, 4, got"),
        ({"pp": 3}, "parallel.pp: the product of the sizes must be the number of ranks, 4, got"),
        ({"pp": 2, "stages_per_rank": 2}, "parallel.stages_per_rank: must be 2 or more with parallel.schedule=interl"),
        ({"pp": 2, "schedule": "interleaved"}, "parallel.stages_per_rank: must be 2 or more with parallel.schedule=in"),
        ({"stages_per_rank": 2, "schedule": "interleaved"}, "parallel.schedule: interleaved needs parallel.pp of at l"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        axis_sizes(ParallelOptions(**options), 4)
    assert str(caught.value).startswith(message)


def test_ranks_of_one_share_of_a_batch_have_one_number() -> None:
    sizes = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "tp": 2}
    assert [data_rank(sizes, rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"pp": 2, "stages_per_rank": 2},
            "parallel.stages_per_rank: must be at most 1, as parallel.pp=2 shares the model's num_hidden_layers, 2, "
            "got 2; lower parallel.pp, or take another parallel.schedule",
        ),
        ({"tp": 3}, "parallel.tp: must divide the model's num_attention_heads, 4, got 3"),
        ({"tp": 4}, "parallel.tp: must divide the model's num_key_value_heads, 2, got 4"),
        ({"pp": 3}, "parallel.pp: must be at most the model's num_hidden_layers, 2, got 3"),
        ({"tp": 2, "pp": 2}, ""),
    ],
)
def test_what_the_model_cannot_be_cut_into_is_named(sizes: dict[str, int], message: str) -> None:
    sizes = dict.fromkeys(AXES, 1) | sizes
    stages_per_rank = sizes.pop("stages_per_rank", 1)
    if not message:
        check_fits(sizes, text_config())
        return
    with pytest.raises(RecipeError) as caught:
        check_fits(sizes, text_config(), stages_per_rank)
    assert str(caught.value).startswith(message)

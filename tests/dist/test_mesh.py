"""The groups of a mesh, as each of its ranks sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from ostro.parallel.mesh import AXES, build_mesh, data_rank
from ostro.parallel.options import ParallelOptions
from tests.helpers.ranks import RankPool


def _seen(group: dist.ProcessGroup, sizes: dict[str, int]) -> dict[str, Any]:
    mesh = build_mesh(ParallelOptions(**sizes), group.size(), "cpu")
    groups = {axis: mesh.group(axis) for axis in AXES} | {"data": mesh.data_group}
    assert mesh.data_group is None or mesh.data_group.rank() == data_rank(mesh.sizes, group.rank())
    seen: dict[str, Any] = {name: group and dist.get_process_group_ranks(group) for name, group in groups.items()}
    return seen | {"fsdp": mesh.fsdp and mesh.fsdp.mesh.tolist(), "splits_model": mesh.splits_model}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"pp": 2, "tp": 2}, {"pp": [0, 2], "tp": [0, 1], "data": None, "fsdp": None, "splits_model": True}),
        ({"dp_shard": 2, "tp": 2}, {"tp": [0, 1], "data": [0, 2], "fsdp": [0, 2], "splits_model": True}),
        ({"dp_replicate": 2, "tp": 2}, {"tp": [0, 1], "data": [0, 2], "fsdp": None, "splits_model": True}),
        ({"dp_replicate": 2, "pp": 2}, {"pp": [0, 2], "data": [0, 1], "fsdp": None, "splits_model": True}),
        ({"dp_replicate": 2, "dp_shard": 2}, {"data": [0, 1, 2, 3], "fsdp": [[0, 1], [2, 3]], "splits_model": True}),
        ({"dp_replicate": 4}, {"data": [0, 1, 2, 3], "fsdp": None, "splits_model": False}),
    ],
)
def test_rank_0_and_its_peers(ranks: RankPool, sizes: dict[str, int], expected: dict[str, Any]) -> None:
    first, *others = ranks.run(_seen, sizes, world_size=4)
    assert {key: first[key] for key in expected} == expected
    assert all(first[axis] is None for axis in AXES if sizes.get(axis, 1) == 1)
    for other in others:  # every rank is in its own groups, and all ranks are in some group of each kind
        assert {key: type(value) for key, value in other.items()} == {key: type(value) for key, value in first.items()}

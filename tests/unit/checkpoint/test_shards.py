"""Writing shards holds one of them in memory at a time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from ostro.checkpoint.shards import Piece, write_shards


def test_only_one_shard_is_in_memory(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0

    def make(number: int) -> Mapping[str, torch.Tensor]:
        nonlocal most_alive
        tensor = torch.full((256,), float(number))
        made.append(weakref.ref(tensor))
        most_alive = max(most_alive, sum(ref() is not None for ref in made))
        return {f"t{number}": tensor}

    pieces = [Piece(1024, functools.partial(make, number)) for number in range(9)]
    write_shards(tmp_path, pieces, max_shard_gib=3 * 1024 / 2**30)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6", "t7", "t8"]]
    assert most_alive == 3

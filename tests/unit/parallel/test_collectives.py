"""Gathers over ranks: values, exact gradients, uneven and empty ranks; and the pool of ranks itself."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ostro.parallel.collectives import all_gather_rows, gather_counts
from tests.helpers.ranks import RankError, RankPool

COUNTS = {2: [(3, 1), (2, 4)], 3: [(3, 1), (0, 0), (2, 4)]}


def test_one_process_sends_nothing() -> None:
    part = torch.arange(6.0).view(3, 2)
    assert gather_counts((3, 5), None, part.device) == [[3, 5]]
    assert all_gather_rows([part], [[3]], None)[0] is part


def _rows(rank: int, counts: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in counts[rank]]


def _loss(first: torch.Tensor, second: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss that differs between ranks and needs the rows of all of them."""
    return (rank + 1) * (first @ second.T).tanh().sum() + first.square().sum()


def _gather_on_rank(group: dist.ProcessGroup, counts: list[tuple[int, int]]) -> tuple[list[torch.Tensor], ...]:
    rank = group.rank()
    assert gather_counts(counts[rank], group, torch.device("cpu")) == [list(sizes) for sizes in counts]
    parts = [part.requires_grad_() for part in _rows(rank, counts)]
    gathered = all_gather_rows(parts, counts, group)
    _loss(*gathered, rank).backward()
    return [rows.detach() for rows in gathered], [part.grad for part in parts]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_and_gradient_equal_one_process(ranks: RankPool, world_size: int) -> None:
    counts = COUNTS[world_size]
    local = [_rows(rank, counts) for rank in range(world_size)]
    whole = [torch.cat(parts).requires_grad_() for parts in zip(*local, strict=True)]
    sum(_loss(*whole, rank) for rank in range(world_size)).backward()

    results = ranks.run(_gather_on_rank, counts, world_size=world_size)
    for gathered, _ in results:
        for rows, expected in zip(gathered, whole, strict=True):
            assert torch.equal(rows, expected)
    for part, expected in enumerate(whole):
        grad = torch.cat([grads[part] for _, grads in results])
        torch.testing.assert_close(grad, expected.grad, rtol=1e-12, atol=1e-12)


def _gather_ids(group: dist.ProcessGroup) -> list[torch.Tensor]:
    ids = torch.arange(group.rank() + 1) + 10 * group.rank()
    return all_gather_rows([ids], [[1], [2]], group)


def test_integers_are_gathered_too(ranks: RankPool) -> None:
    for (ids,) in ranks.run(_gather_ids):
        assert ids.tolist() == [0, 10, 11]


def _fail_on_rank_1(group: dist.ProcessGroup) -> int:
    if group.rank() == 1:
        raise KeyError("lost")
    dist.barrier(group)
    return group.rank()


def _world_size(group: dist.ProcessGroup) -> tuple[int, int, int]:
    return group.rank(), group.size(), dist.get_world_size()


def test_pool_reports_a_failing_rank_and_goes_on(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 ---.*KeyError: 'lost'"):
        ranks.run(_fail_on_rank_1)
    assert ranks.run(_world_size) == [(0, 2, 2), (1, 2, 2)]
    assert ranks.run(_world_size, world_size=1) == [(0, 1, 1)]


def test_pool_gives_up_on_a_rank_that_hangs() -> None:
    with RankPool() as pool, pytest.raises(RankError, match=r"ranks \[0\] did not answer in time"):
        pool.run(_world_size, world_size=1, timeout_s=0)


def test_pool_refuses_too_many_ranks(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size: must be 1 to 4, got 5"):
        ranks.run(_world_size, world_size=5)

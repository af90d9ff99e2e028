"""Negatives of all ranks: loss, statistics and gradients, summed over ranks, equal one process on the whole batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from ostro.losses.cached import cached_backward
from ostro.losses.contrastive import ContrastiveOutput, LearnedTemperature, contrastive_loss
from ostro.losses.options import ContrastiveOptions
from tests.helpers.ranks import RankPool
from tests.unit.losses.naive import Part, join, make_part

OPTIONS = {
    "plain": ContrastiveOptions(),
    "symmetric": ContrastiveOptions(symmetric=True),
    "all": ContrastiveOptions(symmetric=True, matryoshka_dims=(6, 2), false_negative_margin=0.1),
}
# (queries, documents) of each rank; the last batch of an epoch is uneven, down to a rank without queries.
EVEN, UNEVEN, EMPTY = [(5, 9), (5, 9)], [(5, 9), (3, 4)], [(5, 9), (0, 2), (3, 4)]

Values = dict[str, torch.Tensor]


def _parts(sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[Part]:
    parts = [make_part(*size, seed=rank, num_known=2 + rank) for rank, size in enumerate(sizes)]
    return [dataclasses.replace(part, query=part.query.to(dtype), document=part.document.to(dtype)) for part in parts]


def _values(part: Part, options: ContrastiveOptions, group: dist.ProcessGroup | None) -> tuple[Values, Values]:
    """What sums over ranks, and what is concatenated."""
    temperature = LearnedTemperature(0.07).to(part.query.dtype)
    query, document = part.query.clone().requires_grad_(), part.document.clone().requires_grad_()
    output = contrastive_loss(query, document, part.targets, temperature=temperature(), options=options, group=group)
    output.loss.backward()
    summed = {name: value.detach() for name, value in vars(output).items()}
    summed["temperature gradient"] = temperature.log_temperature.grad
    return summed, {"query gradient": query.grad, "document gradient": document.grad}


def _on_rank(
    group: dist.ProcessGroup, sizes: list[tuple[int, int]], dtype: torch.dtype, options: ContrastiveOptions
) -> tuple[Values, Values]:
    return _values(_parts(sizes, dtype)[group.rank()], options, group)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ranks_equal_one_process(ranks: RankPool, dtype: torch.dtype, sizes: list[tuple[int, int]], name: str) -> None:
    summed, joined = _values(join(_parts(sizes, dtype)), OPTIONS[name], None)
    assert summed["num_masked"] > 0
    results = ranks.run(_on_rank, sizes, dtype, OPTIONS[name], world_size=len(sizes))
    # 1e-6 of the largest entry: float32 sums taken in another order, rank by rank.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for key, expected in summed.items():
        value = sum(rank_summed[key] for rank_summed, _ in results)
        torch.testing.assert_close(value, expected, rtol=2 * tolerance, atol=tolerance)
    for key, expected in joined.items():
        value = torch.cat([rank_joined[key] for _, rank_joined in results])
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def _local_negatives_only(
    group: dist.ProcessGroup, sizes: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[Values, Values]:
    return _values(_parts(sizes, dtype)[group.rank()], OPTIONS["plain"], None)


def test_the_comparison_can_fail(ranks: RankPool) -> None:
    _, joined = _values(join(_parts(UNEVEN, torch.float64)), OPTIONS["plain"], None)
    results = ranks.run(_local_negatives_only, UNEVEN, torch.float64)
    gradient = torch.cat([rank_joined["query gradient"] for _, rank_joined in results])
    assert (gradient - joined["query gradient"]).abs().max() > 0.1 * gradient.abs().max()


def _cached(group: dist.ProcessGroup | None, sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear encoder over texts that are vectors, in micro-batches of 4."""
    parts = _parts(sizes, torch.float64)
    part = join(parts) if group is None else parts[group.rank()]
    weight = torch.eye(12, dtype=torch.float64).add(0.1).requires_grad_()
    texts = torch.cat((part.query, part.document))
    rows = [chunk.tolist() for chunk in torch.randperm(len(texts), generator=torch.Generator().manual_seed(7)).split(4)]

    def loss_fn(embeddings: torch.Tensor) -> ContrastiveOutput:
        query, document = embeddings.split([len(part.query), len(part.document)])
        return contrastive_loss(query, document, part.targets, temperature=0.1, options=OPTIONS["all"], group=group)

    output = cached_backward(
        lambda batch: torch.nn.functional.normalize(batch @ weight),
        [texts[group_rows] for group_rows in rows],
        rows,
        loss_fn,
    )
    return output.loss, weight.grad


def test_cached_ranks_equal_one_process(ranks: RankPool) -> None:
    loss, gradient = _cached(None, EMPTY)
    results = ranks.run(_cached, EMPTY, world_size=3)
    torch.testing.assert_close(sum(rank_loss for rank_loss, _ in results), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(sum(rank_gradient for _, rank_gradient in results), gradient, rtol=1e-12, atol=1e-13)

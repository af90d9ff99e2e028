"""A head whose rows are spread over ranks: loss and gradients equal one process with the whole head."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ostro.losses.linear_ce import fused_linear_cross_entropy
from tests.helpers.ranks import RankError, RankPool
from tests.unit.losses.test_linear_ce import make_inputs, plain, values

EVEN, UNEVEN, EMPTY = [25, 25], [40, 10], [20, 0, 30]


def _on_rank(
    group: dist.ProcessGroup, sizes: list[int], dtype: torch.dtype, trains: tuple[bool, bool], label: int | None
) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels = make_inputs(dtype=dtype)
    if label is not None:
        labels = torch.full_like(labels, label)

    def loss_of(*inputs: torch.Tensor) -> torch.Tensor:
        return fused_linear_cross_entropy(*inputs, num_tokens=7, chunk_rows=4, vocab_group=group)

    return values(loss_of, hidden, weight.split(sizes)[group.rank()], labels, trains=trains)


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_ranks_equal_one_process(ranks: RankPool, dtype: torch.dtype, sizes: list[int]) -> None:
    loss, hidden_grad, weight_grad = values(plain, *make_inputs(dtype=dtype))
    results = ranks.run(_on_rank, sizes, dtype, (True, True), None, world_size=len(sizes))
    # sums over vocabulary taken in another order, rank by rank
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    for rank_loss, rank_hidden_grad, _ in results:
        torch.testing.assert_close(rank_loss, loss, **tolerance)
        torch.testing.assert_close(rank_hidden_grad, hidden_grad, **tolerance)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), weight_grad, **tolerance)


def test_ranks_agree_bit_for_bit_on_what_they_share(ranks: RankPool) -> None:
    first, second = ranks.run(_on_rank, UNEVEN, torch.bfloat16, (True, False), None)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] is None


def test_bfloat16_ranks_are_no_further_from_float32_than_the_plain_form(ranks: RankPool) -> None:
    hidden, weight, labels = make_inputs(dtype=torch.bfloat16)
    truth = values(plain, hidden.float(), weight.float(), labels)
    reference = values(plain, hidden, weight, labels)
    results = ranks.run(_on_rank, UNEVEN, torch.bfloat16, (True, True), None)
    got = (results[0][0], results[0][1], torch.cat([result[2] for result in results]))
    for ours, theirs, exact in zip(got, reference, truth, strict=True):
        assert (ours.float() - exact).norm() <= (theirs.float() - exact).norm() + 1e-6 * exact.norm()


def test_no_label_is_zero_on_every_rank(ranks: RankPool) -> None:
    for loss, hidden_grad, weight_grad in ranks.run(_on_rank, UNEVEN, torch.float32, (True, True), -100):
        assert loss == 0
        assert not hidden_grad.any()
        assert not weight_grad.any()


def test_label_outside_the_whole_vocabulary_fails_on_every_rank(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="labels: row 0 is 50, must be 0 to 49"):
        ranks.run(_on_rank, UNEVEN, torch.float32, (True, True), 50)


def _different_labels(group: dist.ProcessGroup) -> None:
    hidden, weight, labels = make_inputs()
    labels[: 2 + group.rank()] = -100
    fused_linear_cross_entropy(hidden, weight.chunk(2)[group.rank()], labels, vocab_group=group)


def test_different_labels_are_refused_before_they_are_used(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"labels: all ranks of vocab_group must pass the same, got \[14, 13\]"):
        ranks.run(_different_labels)


def _distributed_head(group: dist.ProcessGroup) -> None:
    hidden, weight, labels = make_inputs()
    head = distribute_tensor(weight, init_device_mesh("cpu", (group.size(),)), [Shard(0)])
    assert isinstance(head, DTensor)
    loss = fused_linear_cross_entropy(hidden, head.to_local(), labels, num_tokens=7, vocab_group=group)
    torch.testing.assert_close(loss, plain(hidden, weight, labels))
    fused_linear_cross_entropy(hidden, head, labels)


def test_a_dtensor_is_refused_and_its_local_rows_are_right(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="weight: must be a plain tensor, got DTensor"):
        ranks.run(_distributed_head)

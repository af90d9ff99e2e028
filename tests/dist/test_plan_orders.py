"""What a plan takes a rank to keep is what torch's schedule lets it keep."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

from ostro.plan.orders import Turn, turns
from tests.helpers.ranks import RankPool

Order = list[tuple[str, int]]


def _orders(group: dist.ProcessGroup, stages_per_rank: int, num_micro_batches: int) -> dict[int, Order]:
    """Direction and stage of every piece of work, by rank."""
    size, device = group.size(), torch.device("cpu")
    stages = [
        PipelineStage(torch.nn.Identity(), group.rank() + number * size, stages_per_rank * size, device, group=group)
        for number in range(stages_per_rank)
    ]
    schedule = ScheduleInterleaved1F1B(stages, num_micro_batches, loss_fn=torch.nn.MSELoss())
    orders = schedule.pipeline_order.items()
    return {rank: [(a.computation_type.value, a.stage_index // size) for a in order if a] for rank, order in orders}


def _turns(order: Order, stages_per_rank: int) -> set[Turn]:
    found, in_flight, has_gradients = set(), [0] * stages_per_rank, False
    for kind, stage in order:
        in_flight[stage] -= kind != "F"
        found.add(Turn(kind == "F", stage, tuple(in_flight), has_gradients))
        in_flight[stage] += kind == "F"
        has_gradients |= kind != "F"
    return found


@pytest.mark.parametrize(("num_ranks", "stages_per_rank", "num_micro_batches"), [(2, 2, 3), (2, 3, 8), (4, 2, 10)])
def test_turns_are_those_of_the_schedule(
    ranks: RankPool, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> None:
    orders = ranks.run(_orders, stages_per_rank, num_micro_batches, world_size=num_ranks)[0]
    assert len(orders) == num_ranks
    sizes = {"num_ranks": num_ranks, "stages_per_rank": stages_per_rank, "num_micro_batches": num_micro_batches}
    for rank, order in orders.items():
        assert {kind for kind, _ in order} == {"F", "B"}
        assert turns("interleaved", rank=rank, **sizes) == _turns(order, stages_per_rank)


def test_stages_of_a_pipeline_keep_fewer_the_later_they_are() -> None:
    def most(schedule: str) -> list[int]:
        sizes = {"num_ranks": 8, "stages_per_rank": 1, "num_micro_batches": 5}
        ranks = [turns(schedule, rank=rank, **sizes) for rank in range(8)]
        return [1 + max(turn.others[0] for turn in rank) for rank in ranks]

    assert most("1f1b") == [5, 5, 5, 5, 4, 3, 2, 1]
    assert most("gpipe") == [5] * 8

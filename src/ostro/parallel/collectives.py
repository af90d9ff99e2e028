"""Collectives over ranks whose row counts differ, with exact gradients.

This file moves rows between ranks; what they mean is left to the callers. `group=None` is one process everywhere:
nothing is sent and tensors come back as they are.

The gradient of a gather: when rank r holds the loss L_r and training minimises the sum of all L_r, the gradient of
rank r's own rows is the sum over *all* ranks of the gradients of those rows. Keeping only the local part, or dividing
by the number of ranks, trains on something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Placement, Replicate

# 128 MiB of float32: large enough that the links are full, small beside the gradients themselves.
_BUCKET_ENTRIES = 2**25


def gather_counts(counts: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Tells every rank the counts of every rank.

    Args:
        counts: k integers of this rank.
        group: Ranks that take part; None for one process.
        device: Where the group's backend wants its tensors.

    Returns:
        k integers per rank, by rank.

    Distributed: one all-gather of k int64; k is the same on all ranks.
    """
    if group is None:
        return [list(counts)]
    local = torch.tensor(counts, dtype=torch.int64, device=device)
    table = local.new_empty(group.size(), len(counts))
    dist.all_gather(list(table.unbind()), local, group=group)
    rows: list[list[int]] = table.tolist()
    return rows


def all_gather_rows(
    parts: Sequence[torch.Tensor], counts: Sequence[Sequence[int]], group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Concatenates each part over the ranks, in one collective.

    Equal to `[torch.cat([part of rank 0, part of rank 1, ...]) for each part]`, with the gradient of the loss summed
    over ranks.

    Args:
        parts: k local tensors `[n_i, ...]` of one dtype and device, equal in all sizes but the first.
        counts: `counts[rank][i]` is the number of rows of part i on that rank, zero included.
        group: Ranks that take part; None for one process.

    Returns:
        k tensors `[sum of n_i over ranks, ...]`, rows in rank order.

    Distributed: one all-gather, and one reduce-scatter in backward if a part requires grad; both are padded to the
        largest rank. Every rank must run backward through the result if any does.
    """
    if group is None:
        return list(parts)
    sizes = [sum(rank_counts) for rank_counts in counts]
    rows = _AllGatherRows.apply(torch.cat(list(parts)), sizes, group)
    pieces = rows.split([count for rank_counts in counts for count in rank_counts])
    return [torch.cat(pieces[part :: len(parts)]) for part in range(len(parts))]


class _AllGatherRows(torch.autograd.Function):
    """All-gather of `[n_rank, ...]` rows; backward sums each rank's rows over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        gathered = rows.new_empty(len(sizes), max(sizes), *rows.shape[1:])
        dist.all_gather(list(gathered.unbind()), _pad_rows(rows, max(sizes)), group=group)
        return torch.cat([block[:size] for block, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        blocks = [_pad_rows(block, max(ctx.sizes)) for block in grad.split(ctx.sizes)]
        local = torch.empty_like(blocks[0])
        dist.reduce_scatter(local, blocks, group=ctx.group)
        return local[: ctx.sizes[ctx.group.rank()]], None, None


def _pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`rows` followed by zero rows up to `num_rows`, contiguous as collectives need."""
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, num_rows - rows.shape[0])).contiguous()


def gather_whole(tensor: DTensor) -> torch.Tensor:
    """All of a tensor that is split over ranks, without a gradient.

    Equal to `tensor.full_tensor()`, which logs a warning where rows are split along two axes of a mesh.

    Args:
        tensor: On any mesh.

    Distributed: one all-gather for each axis that splits it.
    """
    placements: list[Placement] = list(tensor.placements)
    with torch.no_grad():
        for axis in range(len(placements)):
            placements[axis] = Replicate()
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()


def sum_gradients(weights: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Replaces every gradient by its sum over the ranks.

    A gradient that no rank has stays None, so that an optimizer passes over the weight as in one process; one that only
    other ranks have counts as zero here.

    Args:
        weights: The same on every rank, in the same order, all on one device; gradients of one dtype. Of a DTensor,
            what this rank holds is summed with what the others hold.
        group: Ranks that take part; None for one process.

    Distributed: one all-reduce of a flag per weight, then one for each bucket of up to 2^25 entries. All ranks end with
        the same bits.
    """
    if group is None or not weights:
        return
    present = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
    bucket: list[torch.Tensor] = []
    for weight, is_present in zip(weights, present.tolist(), strict=True):
        if not is_present:
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        if bucket and sum(map(torch.numel, bucket)) + gradient.numel() > _BUCKET_ENTRIES:
            _sum_in_place(bucket, group)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum_in_place(bucket, group)


def sum_over_ends(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replaces every tensor on the first and the last rank by the sum of the two, to the same bits.

    Args:
        tensors: The same shapes and dtypes on both; not looked at on the ranks between.
        group: At least two ranks.

    Distributed: each of the two ranks sends its tensors to the other, in pieces of up to 2^25 entries.
    """
    last = group.size() - 1
    if group.rank() not in (0, last):
        return
    peer = last - group.rank()
    for tensor in tensors:
        for piece in tensor.view(-1).split(_BUCKET_ENTRIES):
            other = torch.empty_like(piece)
            _exchange(((dist.isend, piece), (dist.irecv, other)), group, peer)
            piece += other


def send(tensor: torch.Tensor, group: dist.ProcessGroup, peer: int) -> None:
    """Sends a tensor to a rank that calls `receive`.

    Args:
        tensor: Contiguous.
        group: Both ranks are in it.
        peer: Number of the other one in the group.

    Distributed: one message.
    """
    _exchange(((dist.isend, tensor),), group, peer)


def receive(tensor: torch.Tensor, group: dist.ProcessGroup, peer: int) -> None:
    """Receives into a tensor what another rank sends by `send`.

    Args:
        tensor: Contiguous, of the shape and dtype of what is sent.
        group: Both ranks are in it.
        peer: Number of the other one in the group.

    Distributed: one message.
    """
    _exchange(((dist.irecv, tensor),), group, peer)


def _exchange(messages: Sequence[tuple[Callable[..., Any], torch.Tensor]], group: dist.ProcessGroup, peer: int) -> None:
    """Messages to and from one rank, as a batch: NCCL would make another communicator for a single one."""
    ops = [dist.P2POp(op, part, group=group, group_peer=peer) for op, part in messages]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def _sum_in_place(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))

"""The gradients of a step, whichever ranks hold which part of the weights: summed over samples, and their norm.

How tensors travel is left to `collectives`. A weight that is split over ranks is a DTensor: one axis of its mesh for
each way it is split. A weight that is not split over `tp` is held by all ranks of `tp`, which compute its gradient
apart, from the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ostro.parallel.collectives import sum_gradients
from ostro.parallel.mesh import Mesh


def reduce_gradients(weights: Iterable[torch.Tensor], mesh: Mesh) -> None:
    """Makes the gradients of this rank's samples those of the whole batch.

    Args:
        weights: All that train on this rank, in the same order on every rank that holds them.
        mesh: Of the run.

    Distributed: one reduction over the data-parallel ranks, without the weights that FSDP splits, which it has summed
        in the backward pass; and one over `tp` of the weights held whole there.
    """
    weights = list(weights)
    summed_by_fsdp = mesh.sizes["dp_shard"] > 1
    sum_gradients([w for w in weights if not (summed_by_fsdp and isinstance(w, DTensor))], mesh.data_group)
    tp = mesh.group("tp")
    if tp is None:
        return
    # the same number on each rank but for kernels that add in any order: the mean keeps the copies the same to the bit
    average_gradients([w for w in weights if "tp" not in _axes(w)], tp)


def average_gradients(weights: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replaces the gradients of weights that several ranks hold whole by their mean.

    Args:
        weights: The same on all ranks, in the same order.
        group: The ranks.

    Distributed: as `sum_gradients`.
    """
    sum_gradients(weights, group)
    for weight in weights:
        if weight.grad is not None:
            weight.grad.div_(group.size())


def gradient_norm(gradients: Sequence[torch.Tensor], mesh: Mesh | None) -> torch.Tensor:
    """The norm over all gradients of the model, each entry counted once.

    Args:
        gradients: Those of this rank: whole ones and DTensors of any mesh.
        mesh: Of the run; None for one process.

    Returns:
        0-d, the same bits on every rank.

    Distributed: one all-reduce of a float64 over all ranks, where the model is split.
    """
    if mesh is None or mesh.devices is None or not mesh.splits_model:
        return torch.nn.utils.get_total_norm(gradients)
    by_shards: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_shards.setdefault(_num_shards(gradient), []).append(local_part(gradient))
    square = torch.zeros((), dtype=torch.float64, device=mesh.devices.device_type)
    for num_shards, parts in by_shards.items():
        square += torch.nn.utils.get_total_norm(parts).double() ** 2 * num_shards
    dist.all_reduce(square)
    # what a rank holds is held by all ranks of its stage, but for those that hold another shard
    return (square / (math.prod(mesh.sizes.values()) // mesh.sizes["pp"])).sqrt().float()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: torch.Tensor) -> DeviceMesh | None:
    """The mesh that a tensor is spread over; None for a whole one."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _axes(tensor: torch.Tensor) -> tuple[str, ...]:
    mesh = mesh_of(tensor)
    return () if mesh is None else mesh.mesh_dim_names or ()


def _num_shards(tensor: torch.Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())

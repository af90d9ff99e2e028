"""The sizes of a run's mesh: which axes its ranks are laid out on, checked before anything is sent.

What an axis does to a model is left to `apply`, and to the gradients to `collectives`.
"""

from __future__ import annotations

import math

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ostro.errors import RecipeError
from ostro.parallel.options import ParallelOptions

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Names of the axes, outermost first."""

_SPLITS = ("pp", "tp")


def axis_sizes(options: ParallelOptions, world_size: int) -> dict[str, int]:
    """Size of every axis, whose product is the number of ranks.

    Args:
        options: Sizes asked for; one of `dp_replicate` and `dp_shard` may be -1.
        world_size: Number of ranks, >= 1.

    Returns:
        Size by axis, in the order of `AXES`.

    Raises:
        RecipeError: When the sizes do not make up the ranks, or ask for an axis that no run can use yet.

    Distributed: no collectives. Every rank finds the same error, before its first collective.
    """
    sizes = {axis: int(vars(options)[axis]) for axis in AXES}
    for axis, size in sizes.items():
        if size == 0:
            raise RecipeError(f"parallel.{axis}: must be at least 1, or -1 for what is left of the ranks, got 0")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise RecipeError(f"parallel.{open_axes[1]}: only one of {' and '.join(open_axes)} can be -1; set the other")
    given = math.prod(size for size in sizes.values() if size != -1)
    for axis in open_axes:
        sizes[axis] = world_size // given
    for axis in _SPLITS:
        if sizes[axis] > 1:
            raise RecipeError(
                f"parallel.{axis}: must be 1, got {sizes[axis]}; the ranks of a run cannot split a layer or "
                "the layers among them yet; use parallel.dp_shard to split the parameters"
            )
    if math.prod(sizes.values()) != world_size:
        shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis not in open_axes)
        key = next((axis for axis in AXES if axis not in open_axes and sizes[axis] > 1), "dp_replicate")
        raise RecipeError(
            f"parallel.{key}: the product of the sizes must be the number of ranks, {world_size}, got {shown}; "
            "set it to -1 or start another number of processes"
        )
    return sizes


def build_mesh(options: ParallelOptions, world_size: int, device_type: str) -> DeviceMesh | None:
    """The ranks that split parameters: `dp_shard`, or `dp_replicate` by `dp_shard`; None where each holds all of them.

    Args:
        options: Sizes asked for.
        world_size: Number of ranks, >= 1.
        device_type: Where tensors are: `cpu` or `cuda`.

    Raises:
        RecipeError: As `axis_sizes`.

    Distributed: makes process groups, so every rank calls it; `axis_sizes` has found faults before.
    """
    sizes = axis_sizes(options, world_size)
    names = tuple(name for name in ("dp_replicate", "dp_shard") if name == "dp_shard" or sizes[name] > 1)
    if sizes["dp_shard"] == 1:
        return None
    return init_device_mesh(device_type, tuple(sizes[name] for name in names), mesh_dim_names=names)

"""The mesh of a run: which axes its ranks are laid out on, checked before anything is sent, and the groups they make.

What an axis does to a model is left to `apply`, and to the gradients to `collectives`. The idea: along `dp_replicate`
and `dp_shard` ranks see other samples, and what is summed or compared over samples goes over these two; along `tp` and
`pp` they see the same samples and hold other parts of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Mistral3Config, PreTrainedConfig

from ostro.errors import RecipeError
from ostro.parallel.options import ParallelOptions

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Names of the axes, outermost first."""


def axis_sizes(options: ParallelOptions, world_size: int) -> dict[str, int]:
    """Size of every axis, whose product is the number of ranks.

    Args:
        options: Sizes asked for; one of `dp_replicate` and `dp_shard` may be -1.
        world_size: Number of ranks, >= 1.

    Returns:
        Size by axis, in the order of `AXES`.

    Raises:
        RecipeError: When the sizes do not make up the ranks, or as `check_schedule`.

    Distributed: no collectives. Every rank finds the same error, before its first collective.
    """
    sizes = {axis: int(vars(options)[axis]) for axis in AXES}
    for axis, size in sizes.items():
        if size == 0:
            raise RecipeError(f"parallel.{axis}: must be at least 1, or -1 for what is left of the ranks, got 0")
    check_schedule(options, sizes["pp"])
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise RecipeError(f"parallel.{open_axes[1]}: only one of {' and '.join(open_axes)} can be -1; set the other")
    given = math.prod(size for size in sizes.values() if size != -1)
    for axis in open_axes:
        sizes[axis] = world_size // given
    if math.prod(sizes.values()) != world_size:
        shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis not in open_axes)
        key = next((axis for axis in AXES if axis not in open_axes and sizes[axis] > 1), "dp_replicate")
        raise RecipeError(
            f"parallel.{key}: the product of the sizes must be the number of ranks, {world_size}, got {shown}; "
            "set it to -1 or start another number of processes"
        )
    return sizes


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run on their axes, seen from one of them.

    Attributes:
        sizes: Number of ranks along each of `AXES`.
        devices: Over the axes with more than one rank, outermost first; None for one process.
        data_group: Ranks that see the other samples of each batch, `dp_replicate` by `dp_shard`, this one included;
            None where it sees all of them.
    """

    sizes: Mapping[str, int]
    devices: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None

    def along(self, *axes: str) -> DeviceMesh | None:
        """The part of the mesh along some axes on which this rank lies; None where they have one rank.

        Args:
            *axes: Of `AXES`, in their order.
        """
        axes = tuple(axis for axis in axes if self.sizes[axis] > 1)
        return self.devices[axes] if self.devices is not None and axes else None

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks along one axis, this one included; None where it has one rank.

        Args:
            axis: Of `AXES`.
        """
        line = self.along(axis)
        return None if line is None else line.get_group()

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The ranks that split parameters: `dp_shard`, or `dp_replicate` by `dp_shard`; None where none are split."""
        return self.along("dp_replicate", "dp_shard") if self.sizes["dp_shard"] > 1 else None

    @property
    def splits_model(self) -> bool:
        """Whether a rank holds less than the whole model."""
        return any(self.sizes[axis] > 1 for axis in ("pp", "dp_shard", "tp"))


def build_mesh(options: ParallelOptions, world_size: int, device_type: str) -> Mesh:
    """Lays the ranks out on their axes.

    Args:
        options: Sizes asked for.
        world_size: Number of ranks, >= 1.
        device_type: Where tensors are: `cpu` or `cuda`.

    Raises:
        RecipeError: As `axis_sizes`.

    Distributed: makes process groups, so every rank calls it; `axis_sizes` has found faults before.
    """
    sizes = axis_sizes(options, world_size)
    if world_size == 1:
        return Mesh(sizes)
    names = tuple(axis for axis in AXES if sizes[axis] > 1)
    devices = init_device_mesh(device_type, tuple(sizes[axis] for axis in names), mesh_dim_names=names)
    num_data = sizes["dp_replicate"] * sizes["dp_shard"]
    data_group = None
    if num_data == world_size:
        data_group = dist.group.WORLD
    elif num_data > 1:
        by_data = torch.arange(world_size).view(sizes["pp"], num_data, sizes["tp"])
        data_group, _ = dist.new_subgroups_by_enumeration(by_data.transpose(1, 2).reshape(-1, num_data).tolist())
    return Mesh(sizes, devices, data_group)


def data_rank(sizes: Mapping[str, int], rank: int) -> int:
    """Number of a rank among those that see the other samples of each batch: what `Mesh.data_group` counts by.

    Args:
        sizes: Of every axis, from `axis_sizes`.
        rank: From 0.
    """
    return rank // sizes["tp"] % (sizes["dp_replicate"] * sizes["dp_shard"])


def check_fits(sizes: Mapping[str, int], config: PreTrainedConfig, stages_per_rank: int = 1) -> None:
    """Checks that a text tower can be cut as the mesh asks.

    Args:
        sizes: Of every axis, from `axis_sizes`.
        config: Of the text tower.
        stages_per_rank: Of a pipeline.

    Raises:
        RecipeError: When `tp` does not divide its heads, key-value heads, vocabulary or intermediate size, or it has
            fewer layers than stages.

    Distributed: no collectives. Every rank finds the same error.
    """
    fields = config.to_dict()
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
        if fields[name] % sizes["tp"]:
            raise RecipeError(
                f"parallel.tp: must divide the model's {name}, {fields[name]}, got {sizes['tp']}; use a divisor, or "
                "parallel.dp_shard to split the parameters"
            )
    num_layers = fields["num_hidden_layers"]
    if sizes["pp"] > num_layers:
        raise RecipeError(
            f"parallel.pp: must be at most the model's num_hidden_layers, {num_layers}, got {sizes['pp']}"
        )
    if sizes["pp"] * stages_per_rank > num_layers:
        at_most = num_layers // sizes["pp"]
        advice = "" if at_most > 1 else "; lower parallel.pp, or take another parallel.schedule"
        raise RecipeError(
            f"parallel.stages_per_rank: must be at most {at_most}, as parallel.pp={sizes['pp']} "
            f"shares the model's num_hidden_layers, {num_layers}, got {stages_per_rank}{advice}"
        )


def check_schedule(options: ParallelOptions, num_ranks: int) -> None:
    """Checks that the order of a pipeline's micro-batches goes with its size.

    Args:
        options: Of the run.
        num_ranks: Of a pipeline; 1 where there is none.

    Raises:
        RecipeError: When `stages_per_rank` or `interleaved` would have no effect.

    Distributed: no collectives. Every rank finds the same error.
    """
    is_interleaved = options.schedule == "interleaved"
    if is_interleaved != (options.stages_per_rank > 1):
        raise RecipeError(
            "parallel.stages_per_rank: must be 2 or more with parallel.schedule=interleaved and 1 with any other, got "
            f"{options.stages_per_rank} with {options.schedule}"
        )
    if is_interleaved and num_ranks == 1:
        raise RecipeError(
            "parallel.schedule: interleaved needs parallel.pp of at least 2, got 1; raise it, or take 1f1b"
        )


def check_vision_fits(sizes: Mapping[str, int], config: Mistral3Config) -> None:
    """Checks that `tp` can split the vision side of a model, as `parallel.tp_vision` asks.

    Args:
        sizes: Of every axis, from `axis_sizes`.
        config: Of the whole model.

    Raises:
        RecipeError: When `tp` does not divide the vision tower's heads or intermediate size, or the width of the text.

    Distributed: no collectives. Every rank finds the same error.
    """
    vision, text = (part.to_dict() for part in (config.vision_config, config.text_config))  # type: ignore[union-attr]
    divided = {f"vision tower's {name}": vision[name] for name in ("num_attention_heads", "intermediate_size")}
    for name, size in {**divided, "projector's hidden_size": text["hidden_size"]}.items():
        if size % sizes["tp"]:
            raise RecipeError(
                f"parallel.tp_vision: parallel.tp must divide the {name}, {size}, got {sizes['tp']}; set tp_vision to "
                "false, or use a divisor"
            )

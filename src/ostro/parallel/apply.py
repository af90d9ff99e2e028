"""What is applied to a plain model from outside before training: layers split over ranks, activation checkpointing,
compilation, and parameters split over ranks; `prepare` does all of them in the order that they need.

Each stage logs one line with the number of modules it touched, and raises when it matched none.
"""

from __future__ import annotations

import functools
import logging
import re
from contextlib import AbstractContextManager

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ostro.errors import RecipeError
from ostro.parallel.mesh import Mesh
from ostro.parallel.plans import TOKENWISE, Plan, Role
from ostro.parallel.vocabulary import SplitEmbedding, SplitHead

logger = logging.getLogger(__name__)

_HIDDEN_STATES = PrepareModuleInput(
    input_kwarg_layouts={"hidden_states": Replicate()}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
)
_STYLES: dict[Role, ParallelStyle] = {
    "input": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
    "hidden_states": _HIDDEN_STATES,
    "heads": _HIDDEN_STATES,
    "outputs": ColwiseParallel(),
    "inputs": RowwiseParallel(),
}

_COMPILER = "inductor"


def prepare(
    model: PreTrainedModel,
    plan: Plan,
    mesh: Mesh | None,
    *,
    activation_checkpointing: bool = False,
    compiled: bool = False,
    compute_dtype: torch.dtype | None = None,
    shard_frozen: bool = True,
) -> None:
    """Applies what the mesh and the recipe ask for: layers split over `tp`, then activation checkpointing, then
    compilation, then parameters split over `dp_shard`, which takes the parts of a layer for its whole.

    Args:
        model: On any device, also the meta device.
        plan: How its layers are split.
        mesh: Of the run, which `check_fits` has passed; None for one process.
        activation_checkpointing: Whether layers compute their activations again.
        compiled: Whether parts of layers are compiled.
        compute_dtype: What parameters split over `dp_shard` are gathered as, as in `shard_parameters`.
        shard_frozen: Whether those include frozen ones, as there.

    Raises:
        RecipeError: When torch cannot compile on this machine.
        ValueError: When a pattern of the plan matches nothing.

    Distributed: no collectives; `model` must be the same on every rank.
    """
    if mesh is not None and (tp := mesh.along("tp")) is not None:
        split_layers(model, plan, tp)
    if activation_checkpointing:
        checkpoint_activations(model)
    if compiled:
        compile_layers(model)
    if mesh is not None and mesh.fsdp is not None:
        shard_parameters(model, mesh.fsdp, compute_dtype=compute_dtype, shard_frozen=shard_frozen)


def split_layers(model: torch.nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Splits layers over ranks: each keeps its rows or columns of their weights, which become DTensors.

    Weights that modules share stay shared.

    Args:
        model: On any device, also the meta device.
        plan: Roles by module name.
        mesh: 1-D.

    Raises:
        ValueError: When a pattern matches no module.

    Distributed: no collectives; each rank keeps its part of the weights it has. Every rank must run the same modules on
        the same inputs.
    """
    names = dict(model.named_modules())
    shared: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(weight), []).append(name)
    num_split = 0
    for pattern, role in plan.items():
        matched = [name for name in names if re.fullmatch(pattern, name)]
        if not matched:
            raise ValueError(f"{pattern}: no module of {type(model).__name__} has such a name")
        for name in matched:
            if role in ("vocabulary", "head"):
                _split_vocabulary(model, name, mesh)
            else:
                # without a source: every rank has the whole weight, or none has storage yet
                parallelize_module(names[name], mesh, _STYLES[role], src_data_rank=None)
            if role == "heads":
                names[name].num_heads //= mesh.size()
        num_split += len(matched)
    for first, *others in shared.values():
        for name in others:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_parameter(child, model.get_parameter(first))
    logger.info("layers split over %d ranks: %d modules", mesh.size(), num_split)


def _split_vocabulary(model: torch.nn.Module, name: str, mesh: DeviceMesh) -> None:
    whole = model.get_submodule(name)
    split: SplitEmbedding | SplitHead
    with torch.device("meta"):
        if isinstance(whole, torch.nn.Embedding):
            split = SplitEmbedding(whole.num_embeddings, whole.embedding_dim, whole.padding_idx)
        else:
            assert isinstance(whole, torch.nn.Linear)  # the plan says so
            split = SplitHead(whole.in_features, whole.out_features, bias=False)
    weight = distribute_tensor(whole.weight, mesh, [Shard(0)], src_data_rank=None)
    split.weight = torch.nn.Parameter(weight, requires_grad=whole.weight.requires_grad)
    model.set_submodule(name, split.train(whole.training))


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Makes every transformer layer keep only its input and compute its activations again in the backward pass.

    Gradients stay the same, random draws included; memory falls from all activations of a layer to one hidden state.

    Args:
        model: Any module with layers of transformers.

    Raises:
        ValueError: When there is no such layer.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    layers = _layers(model)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    logger.info("activation checkpointing: %d layers", len(layers))


def compile_layers(model: torch.nn.Module) -> None:
    """Lets torch compile the norms and the MLP of every transformer layer at their first call; names of weights stay.

    These act on one token at a time and see nothing of how a row is packed: one compilation serves any number of
    tokens, and layers of one kind share it. Attention is left as it is: its kernels come compiled, and around them
    torch would compile again for every new number of samples in a row. An MLP that `tp` splits is left, too: torch 2.13
    does not compile the gradient of a DTensor whose sizes change.

    Args:
        model: Any module with layers of transformers; before FSDP.

    Raises:
        RecipeError: When torch cannot compile on this machine.
        ValueError: When there is no such layer, or a layer has no such part.

    Source: `torch.nn.Module.compile`.
    """
    layers = _layers(model)
    _check_compiler(_COMPILER)
    num_parts = 0
    for layer in layers:
        parts = [part for name, part in layer.named_children() if name in TOKENWISE]
        if not parts:
            raise ValueError(f"{type(layer).__name__}: has none of the parts to compile ({', '.join(TOKENWISE)})")
        for part in parts:
            if not any(isinstance(weight, DTensor) for weight in part.parameters()):
                part.compile(backend=_COMPILER, dynamic=True)
                num_parts += 1
    logger.info("compiled at their first call: %d norms and MLPs of %d layers", num_parts, len(layers))


@functools.cache
def _check_compiler(backend: str) -> None:
    """Compiles a trifle, so that a missing compiler shows before weights are read."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.compile(torch.nn.SiLU(), backend=backend)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise RecipeError(
            f"model.compile: torch cannot compile for {device.type} here ({str(error).strip().splitlines()[0]}); "
            "install a C++ compiler such as g++ (and Triton for CUDA), or set model.compile=false"
        ) from error


def shard_parameters(
    model: torch.nn.Module,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    shard_frozen: bool = True,
) -> None:
    """Splits every parameter over the ranks by its first dim: each transformer layer is a group, the rest one more.

    A group's parameters are gathered while it computes and freed after. A rank whose share of a small parameter has no
    row holds an empty one.

    Args:
        model: With layers of transformers; on any device, also the meta device.
        mesh: 1-D; or 2-D, with the parameters split over the second axis and the same along the first (HSDP).
        compute_dtype: What parameters are gathered as; gradients are then *summed* over the ranks in float32, which is
            what a loss divided by global counts needs. None gathers them as they are and *averages* the gradients.
        shard_frozen: Whether parameters without a gradient are split like the others. If not, every rank keeps them
            whole, cast to `compute_dtype`, and nothing of them is gathered.

    Raises:
        ValueError: When the mesh has more axes, or there is no such layer.

    Distributed: no collectives here; `model` must be the same on every rank. Every rank must run the same modules the
        same number of times, forward and backward.

    Source: `torch.distributed.fsdp.fully_shard`.
    """
    if mesh.ndim > 2:
        raise ValueError(f"mesh: must have one or two axes, got {mesh.ndim} ({mesh.mesh_dim_names})")
    layers = _layers(model)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    whole = set() if shard_frozen else _cast_frozen(model, compute_dtype)
    layers = [layer for layer in layers if not whole.issuperset(layer.parameters())]
    for module in (*layers, model):
        split: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        if compute_dtype is not None:
            # gloo can only sum, and so the factor is applied apart from the reduction everywhere
            split.set_force_sum_reduction_for_comms(True)
            split.set_gradient_divide_factor(1.0)
    logger.info("parameters split over %d ranks: %d layers and the rest", mesh.size(mesh.ndim - 1), len(layers))


def without_gradients(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A block in which passes of a model keep no graph: inference mode, but for a model that is split over ranks, as it
    would leave its tensors in buffers that training uses again.

    Args:
        model: Split or not.
    """
    is_split = any(isinstance(weight, DTensor) for weight in model.parameters())
    return torch.no_grad() if is_split else torch.inference_mode()


def free_gathered(model: torch.nn.Module) -> None:
    """Frees what forward passes without a backward pass have left gathered of split parameters.

    Args:
        model: From `shard_parameters`; any other is left alone.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _cast_frozen(model: torch.nn.Module, dtype: torch.dtype | None) -> set[torch.nn.Parameter]:
    """The frozen parameters of a model, which are new ones in `dtype`; what modules share stays shared."""
    cast: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.requires_grad:
                if weight not in cast:
                    cast[weight] = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                module.register_parameter(name, cast[weight])
    return set(cast.values())


def _layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no layer of transformers")
    return layers

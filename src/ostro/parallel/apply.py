"""What is applied to a plain model from outside before training: activation checkpointing, and parameters split over
ranks.

Each stage logs one line with the number of modules it touched, and raises when it matched none.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)


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


def shard_parameters(model: torch.nn.Module, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None = None) -> None:
    """Splits every parameter over the ranks by its first dim: each transformer layer is a group, the rest one more.

    A group's parameters are gathered while it computes and freed after. A rank whose share of a small parameter has no
    row holds an empty one.

    Args:
        model: With layers of transformers; on any device, also the meta device.
        mesh: 1-D; or 2-D, with the parameters split over the second axis and the same along the first (HSDP).
        compute_dtype: What parameters are gathered as; gradients are then *summed* over the ranks in float32, which is
            what a loss divided by global counts needs. None gathers them as they are and *averages* the gradients.

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
    for module in (*layers, model):
        split: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=policy)
        if compute_dtype is not None:
            # gloo can only sum, and so the factor is applied apart from the reduction everywhere
            split.set_force_sum_reduction_for_comms(True)
            split.set_gradient_divide_factor(1.0)
    logger.info("parameters split over %d ranks: %d layers and the rest", mesh.size(mesh.ndim - 1), len(layers))


def _layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no layer of transformers")
    return layers

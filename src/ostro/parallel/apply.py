"""What is applied to a plain model from outside before training: so far, activation checkpointing.

Which ranks hold what is left to later stages of the same fixed order. Each stage logs one line with the number of
modules it touched, and raises when it matched none.
"""

from __future__ import annotations

import functools
import logging

import torch
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
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no layer of transformers to checkpoint")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    logger.info("activation checkpointing: %d layers", len(layers))

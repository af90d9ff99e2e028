"""Rotary buffers after a model was built without storage: `rebuild_all_rotary(model)`.

Weights are left to whoever reads them. The idea: transformers computes the frequencies of a rotary module in its
`__init__` and stores them in no file, so `torch.device("meta")` followed by `to_empty` leaves them uninitialised; and
`model.to(torch.bfloat16)` rounds them, which turns far positions wrong. A fresh instance of the module's own class,
made from its own config on the CPU, has the right ones, and they are copied over.
"""

from __future__ import annotations

import torch

_FREQUENCIES = "inv_freq"


def is_rotary(module: torch.nn.Module) -> bool:
    """Whether a module owns rotary frequencies: a buffer of its own called `inv_freq`.

    Args:
        module: Any module; its children do not count.
    """
    return _FREQUENCIES in dict(module.named_buffers(recurse=False))


@torch.no_grad()
def rebuild_rotary(module: torch.nn.Module) -> None:
    """Gives a rotary module the buffers that a fresh instance of its class has: float32, on the device they are on.

    Buffers of the right type keep their storage. The module itself, its hooks and what else it holds stay as they are.

    Args:
        module: One for which `is_rotary` holds, built from a `config` that it keeps, as those of transformers are.

    Raises:
        ValueError: When a buffer is on the meta device, so has no storage to fill, or the config gives frequencies that
            are not finite.
    """
    with torch.device("cpu"):  # even inside a meta context
        fresh = type(module)(module.config)
    for name, values in fresh.named_buffers(recurse=False):
        buffer = module.get_buffer(name)
        if buffer.is_meta:
            raise ValueError(f"{type(module).__name__}.{name}: has no storage (meta device); call to_empty first")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{type(module).__name__}.{name}: not finite; check rope_parameters of config.json")
        if buffer.dtype == values.dtype and buffer.shape == values.shape:
            buffer.copy_(values)
        else:
            setattr(module, name, values.to(buffer.device))


def rebuild_all_rotary(model: torch.nn.Module) -> int:
    """Rebuilds every rotary module of a model.

    Args:
        model: With storage; sharded or not, as buffers are whole on every rank.

    Returns:
        How many rotary modules were rebuilt.

    Raises:
        ValueError: As `rebuild_rotary`.
    """
    modules = [module for module in model.modules() if is_rotary(module)]
    for module in modules:
        rebuild_rotary(module)
    return len(modules)

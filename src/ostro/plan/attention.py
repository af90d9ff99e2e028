"""Attention on tensors without data, as the kernels of a device keep and make it: for counting, not for computing.

On the meta device torch would take the plain form, which holds `[L, L]` scores that no run ever has. Here the operation
of the device is called by name, so that autograd keeps for the backward pass what it keeps in training. What a batch is
cut into does not matter to memory, and so the row counts as one text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from ostro.models.packed import PACKED_ATTENTION, packed_attention
from ostro.plan.shapes import DeviceKind

Attention = Callable[..., tuple[torch.Tensor, None]]


@contextmanager
def counted_attention(kind: DeviceKind) -> Iterator[None]:
    """Lets models that use packed attention run on the meta device while the block lasts.

    Args:
        kind: Whose kernels to stand in for.
    """
    attention: Attention = _attend_as_cuda if kind == "cuda" else _attend_as_cpu
    AttentionInterface.register(PACKED_ATTENTION, attention)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _attend_as_cuda(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As `packed_attention` on CUDA; float32 goes through the same operation here, which keeps as much."""
    from torch.nn.attention.varlen import varlen_attn

    num_tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    query_Thd, key_Thd, value_Thd = (states[0].transpose(0, 1) for states in (query, key, value))
    key_Thd, value_Thd = key_Thd.repeat_interleave(groups, 1), value_Thd.repeat_interleave(groups, 1)
    offsets = torch.empty(2, dtype=torch.int32, device=query.device)
    output: Any = varlen_attn(query_Thd, key_Thd, value_Thd, offsets, offsets, num_tokens, num_tokens)
    return output[None], None


def _attend_as_cpu(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As `packed_attention` on the CPU: in float32, whatever the model computes in."""
    wide = torch.promote_types(query.dtype, torch.float32)
    states = (tensor.to(wide) for tensor in (query, key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = flash(*states, 0.0, bool(module.is_causal))[0]
    return output.transpose(1, 2).flatten(0, 1)[None].to(query.dtype), None

"""Attention of equal-length texts in low precision on the CPU: torch's forward, and a backward of our own.

Which texts attend together is left to `packed`. torch 2.13's fused CPU kernel is fast forward, but its backward in
bfloat16 takes 2 to 10 times what plain matrix products take up to some hundred tokens (16 texts of 64 tokens: 17
against 3 CPU ms). Plain products under autograd in turn keep the `[L, L]` scores of every layer. The idea: forward is
the fused kernel, which keeps no scores; backward computes them again, a few texts at a time.

Shapes: n texts of L tokens, h query heads, k key heads of which each serves h / k neighbouring query heads, d head
size, R = L * h / k rows of scores per key head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LONGEST_RECOMPUTED = 1024
"""Beyond this many tokens per text the fused kernel's own backward is as fast."""

# Up to this many tokens scores take less memory than the other states of a layer, and autograd may keep them.
_LONGEST_KEPT = 32
# Scores computed at once in backward, in elements: 4 MiB in bfloat16.
_SCORES_AT_ONCE = 1 << 21


def attend_low_precision(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    """`softmax(query @ key.T * scaling) @ value` for every text and head.

    Naive equivalent, up to rounding: `torch.nn.functional.scaled_dot_product_attention(..., enable_gqa=True)`. The
    result does not depend on whether gradients are wanted.

    Args:
        query: `[n, h, L, d]`.
        key: `[n, k, L, d]`.
        value: `[n, k, L, d]`.
        scaling: Factor of the scores.
        causal: Whether a token sees only itself and those before it.

    Returns:
        `[n, h, L, d]`.
    """
    if query.shape[2] > _LONGEST_KEPT:
        output: torch.Tensor = _RecomputedAttention.apply(query, key, value, scaling, causal)
        return output
    query_BRd, key_BLd, value_BLd = (_by_key_head(states, key.shape[1]) for states in (query, key, value))
    scores_BRL = _scores(query_BRd, key_BLd, scaling, causal)
    # float32: as in transformers' eager attention, and faster than a bf16 softmax of short rows
    weights_BRL = torch.softmax(scores_BRL, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights_BRL @ value_BLd).view(query.shape)


class _RecomputedAttention(torch.autograd.Function):
    """The fused kernel forward; backward through scores computed again. B = n * k."""

    @staticmethod
    def forward(  # type: ignore[override]  # autograd's own signature takes anything
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.causal = scaling, causal
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        folded = [_by_key_head(states, key.shape[1]) for states in (query, key, value, gradient)]
        at_once = max(1, _SCORES_AT_ONCE // (folded[0].shape[1] * key.shape[2]))
        gradients = []
        for query_BRd, key_BLd, value_BLd, output_BRd in zip(
            *(states.split(at_once) for states in folded), strict=True
        ):
            scores_BRL = _scores(query_BRd, key_BLd, ctx.scaling, ctx.causal).requires_grad_()
            with torch.enable_grad():
                weights_BRL = torch.softmax(scores_BRL, dim=-1)
            to_weights_BRL = output_BRd @ value_BLd.transpose(1, 2)
            (to_scores_BRL,) = torch.autograd.grad(weights_BRL, scores_BRL, to_weights_BRL)
            gradients.append(
                (
                    to_scores_BRL @ key_BLd * ctx.scaling,
                    to_scores_BRL.transpose(1, 2) @ query_BRd * ctx.scaling,
                    weights_BRL.detach().transpose(1, 2) @ output_BRd,
                )
            )
        to_query, to_key, to_value = (torch.cat(pieces) for pieces in zip(*gradients, strict=True))
        return to_query.view(query.shape), to_key.view(key.shape), to_value.view(value.shape), None, None


def _by_key_head(states: torch.Tensor, key_heads: int) -> torch.Tensor:
    """`[n, heads, L, d]` as `[n * k, R, d]`: query heads that share a key head are laid along L, so that keys need no
    repeating."""
    return states.reshape(states.shape[0] * key_heads, -1, states.shape[-1])


def _scores(query_BRd: torch.Tensor, key_BLd: torch.Tensor, scaling: float, causal: bool) -> torch.Tensor:
    """`[B, R, L]` scaled scores, -inf where a token must not look."""
    scores_BRL = (query_BRd @ key_BLd.transpose(1, 2)).mul_(scaling)
    if causal:
        length = key_BLd.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=scores_BRL.device).triu(1)
        scores_BRL = scores_BRL.unflatten(1, (-1, length)).masked_fill(later, -torch.inf).flatten(1, 2)
    return scores_BRL

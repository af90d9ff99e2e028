"""Activation checkpointing: fewer bytes kept, the same gradients."""

from __future__ import annotations

import pytest
import torch

from ostro.models.packed import PackedTexts, forward_packed, use_packed_attention
from ostro.parallel.apply import checkpoint_activations
from tests.helpers.tiny import token_ids
from tests.unit.models.test_packed import tower


def step(model: torch.nn.Module) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept for the backward pass, and the gradients; dropout draws from the same seed."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        states = forward_packed(model, PackedTexts.from_token_ids(token_ids([30, 30, 9])))
        total = states.square().sum()
    total.backward()
    return kept, [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_gradients_are_equal_and_less_is_kept() -> None:
    plain, recomputed = (tower(attention_dropout=0.2).train() for _ in range(2))
    checkpoint_activations(recomputed)
    use_packed_attention(plain)
    use_packed_attention(recomputed)
    kept, expected = step(plain)
    kept_less, got = step(recomputed)
    assert len(got) == len(list(plain.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert kept_less < 0.5 * kept


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear: has no layer of transformers"):
        checkpoint_activations(torch.nn.Linear(2, 2))

"""Living tensors are counted by their storage, real ones and those without data."""

from __future__ import annotations

import pytest
import torch

from ostro.models.packed import PACKED_ATTENTION, packed_attention
from ostro.plan.attention import counted_attention
from ostro.plan.live import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_and_until_they_die(device: str) -> None:
    with LiveBytes() as live:
        first = torch.ones(1000, device=device)
        view = first.view(10, 100)[:5]
        assert live.now() == live.peak == 4000
        second = first + 1
        assert live.now() == 8000
        del first, second
        assert (live.now(), live.peak) == (4000, 8000)
        assert live.restart() == live.peak == 4000
        del view
        assert live.now() == 0


def test_what_was_there_before_is_added_and_what_shrinks_shrinks() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        live.add([before, None, "text"])
        assert live.now() == 4000
        before.untyped_storage().resize_(0)
        assert live.now() == 0


def test_what_autograd_keeps_is_counted() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with LiveBytes() as live:
        live.add([weight])
        output = (torch.ones(10, 100) @ weight).exp()
        kept = live.now()
        # the input of the product and the result of exp; the product itself is dead
        assert kept == 40_000 + 4000 + 4000
        output.sum().backward()
        assert live.peak > kept


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_attention_without_data_has_the_shape_of_the_real_one_and_is_taken_back(kind: str) -> None:
    from transformers import AttentionInterface

    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query, key = (torch.empty(1, heads, 24, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    with counted_attention(kind):  # type: ignore[arg-type]
        attend = AttentionInterface()[PACKED_ATTENTION]
        assert attend is not packed_attention
        output, _ = attend(module, query, key, key, None, scaling=1.0)
    real = packed_attention(
        module,
        torch.ones(1, 4, 24, 8),
        torch.ones(1, 2, 24, 8),
        torch.ones(1, 2, 24, 8),
        None,
        packed_lengths=(24,),
        packed_offsets=torch.tensor([0, 24], dtype=torch.int32),
        scaling=1.0,
    )[0]
    assert output.shape == real.shape
    assert output.dtype == torch.bfloat16
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention

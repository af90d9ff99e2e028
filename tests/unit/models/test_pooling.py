"""Pooling against a loop over texts, on either padding side, in mixed batches, and packed."""

from __future__ import annotations

import pytest
import torch

from ostro.models.pooling import POOL_TYPES, pool, pool_packed

LENGTHS = (3, 1, 7, 5)
SINGLE_VECTOR = ("avg", "mean", "weighted_avg", "cls", "last")


def reference(text: torch.Tensor, pool_type: str) -> torch.Tensor:
    """The definition, for one text `[n, H]` in float64."""
    text = text.double()
    weights = torch.arange(1, len(text) + 1, dtype=torch.float64)
    return {
        "avg": lambda: text.mean(0),
        "mean": lambda: text.mean(0),
        "weighted_avg": lambda: sum(w * h for w, h in zip(weights, text, strict=True)) / weights.sum(),
        "cls": lambda: text[0],
        "last": lambda: text[-1],
    }[pool_type]()


@pytest.fixture
def texts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, 6) for length in LENGTHS]


def pad(texts: list[torch.Tensor], sides: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states whose padded positions hold nan, which must not leak, and their mask."""
    width = max(map(len, texts)) + 2
    states = torch.full((len(texts), width, texts[0].shape[1]), torch.nan, dtype=texts[0].dtype)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, (text, side) in enumerate(zip(texts, sides, strict=True)):
        start = {"right": 0, "left": width - len(text), "both": 1}[side]
        states[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return states, mask


@pytest.mark.parametrize("sides", [["right"] * 4, ["left"] * 4, ["right", "left", "both", "left"]], ids="-".join)
@pytest.mark.parametrize("pool_type", SINGLE_VECTOR)
def test_padded_texts_match_the_definition(texts: list[torch.Tensor], sides: list[str], pool_type: str) -> None:
    states, mask = pad(texts, sides)
    expected = torch.stack([reference(text, pool_type) for text in texts]).float()
    torch.testing.assert_close(pool(states, mask, pool_type), expected)
    torch.testing.assert_close(pool(states, mask.bool(), pool_type), expected)
    torch.testing.assert_close(pool(states, mask.float(), pool_type), expected)


@pytest.mark.parametrize("pool_type", POOL_TYPES)
def test_packed_texts_match_padded_ones(texts: list[torch.Tensor], pool_type: str) -> None:
    states, mask = pad(texts, ["left", "right", "both", "right"])
    padded = pool(states, mask, pool_type)
    packed = pool_packed(torch.cat(texts), LENGTHS, pool_type)
    if pool_type in ("colbert", "multi_vector"):
        assert not padded[~mask.bool()].any()
        padded = padded[mask.bool()]
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("pool_type", POOL_TYPES)
def test_packed_and_padded_give_the_same_gradients(texts: list[torch.Tensor], pool_type: str) -> None:
    gradients = []
    for packed in (False, True):
        leaves = [text.clone().requires_grad_() for text in texts]
        if packed:
            pooled = pool_packed(torch.cat(leaves), LENGTHS, pool_type)
        else:
            states, mask = pad(leaves, ["left", "right", "both", "right"])
            pooled = pool(states, mask, pool_type)
        pooled.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0])


@pytest.mark.parametrize("pool_type", ["avg", "weighted_avg"])
def test_bfloat16_is_summed_in_float32_and_rounded_once(pool_type: str) -> None:
    torch.manual_seed(0)
    text = (torch.randn(2000, 8) + 1).bfloat16()
    # rounding the exact value is the best a bfloat16 result can be
    expected = reference(text, pool_type).bfloat16()
    packed = pool_packed(text, (2000,), pool_type)[0]
    padded = pool(text[None], torch.ones(1, 2000), pool_type)[0]
    assert packed.dtype == padded.dtype == torch.bfloat16
    assert torch.equal(packed, expected)
    assert torch.equal(padded, expected)


@pytest.mark.parametrize("pool_type", POOL_TYPES)
def test_a_row_without_tokens_is_an_error_that_names_it(pool_type: str) -> None:
    mask = torch.tensor([[1, 1], [0, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"attention_mask: .* rows \[1\]"):
        pool(torch.randn(3, 2, 4), mask, pool_type)
    with pytest.raises(ValueError, match=r"lengths: .* texts \[1\]"):
        pool_packed(torch.randn(3, 4), (2, 0, 1), pool_type)


def test_lengths_must_cover_the_tokens() -> None:
    with pytest.raises(ValueError, match="sum to the 3 tokens given, got 2"):
        pool_packed(torch.randn(3, 4), (1, 1), "avg")


def test_an_unknown_pool_type_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"pooling: must be one of avg, .* got 'max'"):
        pool(torch.randn(1, 2, 4), torch.ones(1, 2), "max")
    with pytest.raises(ValueError, match="got 'max'"):
        pool_packed(torch.randn(2, 4), (2,), "max")

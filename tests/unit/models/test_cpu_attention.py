"""Low-precision attention on the CPU is no further from the truth than torch's, and keeps no scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ostro.models import cpu_attention
from ostro.models.cpu_attention import attend_low_precision

SCALING = 0.3


def states(texts: int, length: int) -> list[torch.Tensor]:
    """Query (4 heads), key, value (2 heads) and an output gradient in bf16, laid out as a layer hands them on."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(texts, length, heads, 16, generator=generator).bfloat16().transpose(1, 2) for heads in (4, 2, 2, 4)
    ]


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * SCALING
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, -1) @ value.repeat_interleave(2, 1)


def results(
    attention: torch.nn.Module | object, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [part.detach().requires_grad_() for part in inputs]
    output = attention(*leaves)  # type: ignore[operator]
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("texts", "length"), [(3, 1), (3, 32), (3, 33), (1, 200)])
def test_output_and_gradients_against_float64(
    texts: int, length: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a few texts at a time, the last time fewer
    monkeypatch.setattr(cpu_attention, "_SCORES_AT_ONCE", 2 * length * length * 4)
    *inputs, gradient = states(texts, length)
    truth = results(
        lambda q, k, v: torch_attention(q, k, v, causal), [part.double() for part in inputs], gradient.double()
    )
    naive = results(lambda q, k, v: torch_attention(q, k, v, causal), inputs, gradient)
    ours = results(lambda q, k, v: attend_low_precision(q, k, v, SCALING, causal), inputs, gradient)
    for exact, reference, got in zip(truth, naive, ours, strict=True):
        assert got.dtype == torch.bfloat16
        assert got.shape == exact.shape
        error, naive_error = (got.double() - exact).norm(), (reference.double() - exact).norm()
        # both round at other places; a quarter more, and 1e-3 where naive is exact, is within the spread of that
        assert error <= 1.25 * naive_error + 1e-3 * exact.norm()


def test_result_does_not_depend_on_whether_gradients_are_wanted() -> None:
    for length in (20, 40):
        *inputs, _ = states(2, length)
        with torch.no_grad():
            expected = attend_low_precision(*inputs, SCALING, False)
        leaves = [part.detach().requires_grad_() for part in inputs]
        assert torch.equal(attend_low_precision(*leaves, SCALING, False), expected)


def test_forward_keeps_no_scores() -> None:
    length = 256
    *inputs, _ = states(1, length)
    leaves = [part.detach().requires_grad_() for part in inputs]
    kept: list[int] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        kept.append(part.numel())
        return part

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        attend_low_precision(*leaves, SCALING, False)
    assert kept
    assert max(kept) < length * length


def test_longest_text_matches_the_fused_kernel() -> None:
    *inputs, gradient = states(1, cpu_attention.LONGEST_RECOMPUTED)
    fused = results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=SCALING, enable_gqa=True), inputs, gradient
    )
    ours = results(lambda q, k, v: attend_low_precision(q, k, v, SCALING, False), inputs, gradient)
    for expected, got in zip(fused, ours, strict=True):
        # bf16 rounding of weights and scores: 2 ** -8 relative, in the norm
        assert (got.float() - expected.float()).norm() <= 0.01 * expected.float().norm()

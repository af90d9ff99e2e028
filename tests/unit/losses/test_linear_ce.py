"""The fused head and cross-entropy of one process: against the plain form, at its edges, and in low precision."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ostro.losses import linear_ce, tiled_head
from ostro.losses.linear_ce import FusedLinearCrossEntropy, fused_linear_cross_entropy, get_final_hidden_states

Values = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def make_inputs(
    num_rows: int = 23, hidden_size: int = 16, vocab_size: int = 50, *, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels, every third of them ignored, both ends of the vocabulary among them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64).to(dtype) / 2
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[::3] = -100
    labels[1], labels[2] = 0, vocab_size - 1
    return hidden, weight, labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, num_tokens: float = 7) -> torch.Tensor:
    """The loss as it is defined, with float32 logits at least."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_tokens


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, num_tokens: float = 7) -> torch.Tensor:
    """Ours in chunks of which the last is not full."""
    return fused_linear_cross_entropy(hidden, weight, labels, num_tokens=num_tokens, chunk_rows=4)


def values(
    function: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    trains: tuple[bool, bool] = (True, True),
    upstream: float = 1.0,
) -> Values:
    """Loss and the gradients of hidden states and head."""
    hidden = hidden.detach().clone().requires_grad_(trains[0])
    weight = weight.detach().clone().requires_grad_(trains[1])
    loss = function(hidden, weight, labels)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary tiles of 7 rows at hidden size 16, so that tiny heads have several and an odd one."""
    monkeypatch.setattr(tiled_head, "_TILE_ELEMENTS", 7 * 16 + 3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)], ids=["both", "frozen", "head only"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_the_plain_form(dtype: torch.dtype, trains: tuple[bool, bool]) -> None:
    inputs = make_inputs(dtype=dtype)
    # an upstream gradient as a loss scale or an average over losses brings it
    expected = values(plain, *inputs, trains=trains, upstream=-3.0)
    got = values(fused, *inputs, trains=trains, upstream=-3.0)
    # sums over rows and vocabulary taken in another order
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for ours, reference in zip(got, expected, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None:
            torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chunk_rows", [1, 15, 16, 1000])
def test_chunks_do_not_change_the_result(chunk_rows: int) -> None:
    inputs = make_inputs()
    got = values(lambda *args: fused_linear_cross_entropy(*args, num_tokens=7, chunk_rows=chunk_rows), *inputs)
    torch.testing.assert_close(got, values(plain, *inputs), rtol=1e-12, atol=1e-12)


def test_leading_dims_and_the_module() -> None:
    hidden, weight, labels = make_inputs(24)
    module = FusedLinearCrossEntropy(chunk_rows=5)
    got = values(lambda h, w, y: module(h.view(2, 12, 16), w, y.view(2, 12), torch.tensor(7)), hidden, weight, labels)
    torch.testing.assert_close(got, values(plain, hidden, weight, labels), rtol=1e-12, atol=1e-12)


def test_divides_by_the_labels_given_unless_told() -> None:
    hidden, weight, labels = make_inputs()
    loss = fused_linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=-100))


def test_parts_add_up_to_the_whole() -> None:
    hidden, weight, labels = make_inputs()
    parts = [values(fused, hidden[rows], weight, labels[rows]) for rows in (slice(0, 6), slice(6, 23))]
    loss, hidden_grad, weight_grad = values(fused, hidden, weight, labels)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), hidden_grad)
    torch.testing.assert_close(parts[0][2] + parts[1][2], weight_grad)


def test_another_ignore_index() -> None:
    hidden, weight, labels = make_inputs()
    loss = fused_linear_cross_entropy(hidden, weight, labels.where(labels >= 0, -1), num_tokens=7, ignore_index=-1)
    torch.testing.assert_close(loss, plain(hidden, weight, labels))


@pytest.mark.parametrize("num_tokens", [None, 0, 7], ids=str)
@pytest.mark.parametrize("num_rows", [23, 0])
def test_no_label_is_zero_with_zero_gradients(num_rows: int, num_tokens: float | None) -> None:
    hidden, weight, labels = make_inputs()
    labels = torch.full_like(labels, -100)[:num_rows]
    loss, hidden_grad, weight_grad = values(
        lambda *args: fused_linear_cross_entropy(*args, num_tokens=num_tokens), hidden[:num_rows], weight, labels
    )
    assert loss == 0
    torch.testing.assert_close(hidden_grad, torch.zeros(num_rows, 16, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(weight_grad, torch.zeros_like(weight), rtol=0, atol=0)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = make_inputs(dtype=torch.float32)
    got = values(fused, hidden * 1000, weight, labels)
    # float32 logits of thousands have steps of 5e-4
    torch.testing.assert_close(got, values(plain, hidden * 1000, weight, labels), rtol=1e-4, atol=1e-3)


def test_nan_is_not_hidden() -> None:
    hidden, weight, labels = make_inputs()
    hidden[1, 0] = torch.nan
    assert fused(hidden, weight, labels).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [96, 100_000])
def test_is_no_further_from_float32_than_the_plain_form(dtype: torch.dtype, num_tokens: float) -> None:
    hidden, weight, labels = make_inputs(150, 64, 4000, dtype=dtype)

    # float16 is trained with a loss scale, without which its gradients are lost
    upstream = 4096.0 if dtype == torch.float16 else 1.0
    truth = values(lambda *args: plain(*args, num_tokens), hidden.float(), weight.float(), labels, upstream=upstream)
    reference = values(lambda *args: plain(*args, num_tokens), hidden, weight, labels, upstream=upstream)
    got = values(
        lambda *args: fused_linear_cross_entropy(*args, num_tokens=num_tokens),
        hidden,
        weight,
        labels,
        upstream=upstream,
    )
    assert got[0].dtype == torch.float32
    for ours, theirs, exact in zip(got, reference, truth, strict=True):
        # float32's own noise on top: a plain loss can be right by luck
        assert (ours.float() - exact).norm() <= (theirs.float() - exact).norm() + 1e-6 * exact.norm()


def test_low_precision_gradients_have_the_dtype_of_their_tensor() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    _, hidden_grad, weight_grad = values(fused, *inputs)
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16


def test_chunks_of_a_bfloat16_head_gradient_are_summed_in_float32() -> None:
    # One row a thousand times: bfloat16 sums would stop growing at 256 equal terms.
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    fused_linear_cross_entropy(
        hidden, weight, torch.zeros(1000, dtype=torch.int64), num_tokens=1, chunk_rows=1
    ).backward()
    assert weight.grad.flatten().tolist() == [-500, 500]


def test_autocast_equals_a_linear_layer_under_autocast() -> None:
    hidden, weight, labels = make_inputs(150, 64, 4000, dtype=torch.float32)
    truth = values(plain, hidden.bfloat16().float(), weight.bfloat16().float(), labels)

    def under_autocast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return run

    reference = values(under_autocast(plain), hidden, weight, labels)
    got = values(under_autocast(lambda *args: fused_linear_cross_entropy(*args, num_tokens=7)), hidden, weight, labels)
    for ours, theirs, exact in zip(got, reference, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= (theirs - exact).norm() + 1e-6 * exact.norm()


def test_bfloat16_hidden_states_and_float32_head_meet_under_autocast() -> None:
    hidden, weight, labels = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = values(fused, hidden.bfloat16(), weight, labels)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16, torch.float32]
    # bfloat16 gradients of entries up to 1
    torch.testing.assert_close(got[2], values(plain, hidden, weight, labels)[2], rtol=0.05, atol=0.02)


def test_leaves_the_precision_of_other_products_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden, weight, labels = make_inputs(dtype=torch.bfloat16)
    fused(hidden, weight, labels)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_makes_no_gradient_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    error = linear_ce._error
    monkeypatch.setattr(linear_ce, "_error", lambda *args: calls.append(1) or error(*args))
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        loss = fused(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert not loss.requires_grad
    assert not calls
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())
    assert not fused(hidden.detach(), weight.detach(), labels).requires_grad
    assert not calls
    fused(hidden, weight.detach(), labels)
    assert calls


def test_second_derivatives_and_second_backward_passes_are_refused() -> None:
    hidden, weight, labels = make_inputs()
    loss = fused(hidden.requires_grad_(), weight, labels)
    with pytest.raises(RuntimeError, match="create_graph asks for a second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = fused(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        loss.backward()


MEASURE = """
import resource, torch
from ostro.losses.linear_ce import fused_linear_cross_entropy
torch.set_num_threads(1)
def run(rows, vocab):
    hidden = torch.zeros(rows, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocab, 8, dtype=torch.bfloat16)
    fused_linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64), chunk_rows=16).backward()
run(16, 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(1024, 100_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_that_of_one_chunk() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    # float32 logits of one chunk are 6 MiB, of all rows 391 MiB
    assert float(done.stdout) < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, -100, 50, 99])}, "labels: row 2 is 50, must be 0 to 49 or -100"),
        ({"labels": torch.tensor([1, -7, 0, 3])}, "labels: row 1 is -7, must be 0 to 49 or -100"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: must have one label per row, \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, "labels: must be integers, got torch.float32"),
        (
            {"weight": torch.zeros(50, 15)},
            r"weight: must be .* got \[50, 15\] for \[4, 16\]",
        ),
        ({"weight": torch.zeros(50, 16, dtype=torch.bfloat16)}, "weight: must have the dtype of hidden_states"),
        ({"weight": torch.zeros(50, 16, dtype=torch.int64)}, "weight: must be floating point, got torch.int64"),
        ({"num_tokens": 0}, "num_tokens: must be > 0 when there are labels, got 0.0"),
        ({"num_tokens": torch.tensor(float("nan"))}, "num_tokens: must be > 0 when there are labels, got nan"),
        ({"chunk_rows": 0}, "chunk_rows: must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "hidden_states": torch.zeros(4, 16),
        "weight": torch.zeros(50, 16),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**{**arguments, **change})


def test_final_hidden_states_of_both_forms() -> None:
    layers = tuple(torch.full((1, 2, 3), float(layer)) for layer in range(4))
    assert get_final_hidden_states(CausalLMOutputWithPast(hidden_states=layers)) is layers[-1]
    assert get_final_hidden_states(CausalLMOutputWithPast(hidden_states=layers[1])) is layers[1]


@dataclasses.dataclass
class Logits:
    """An output without hidden states."""

    logits: int = 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (CausalLMOutputWithPast(), "hidden_states: must be a tensor .* got NoneType; call the model with"),
        (CausalLMOutputWithPast(hidden_states=()), "hidden_states: must be a tensor .* got tuple"),
        (Logits(), "hidden_states: Logits has none"),
    ],
)
def test_outputs_without_final_hidden_states_are_refused(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_final_hidden_states(output)

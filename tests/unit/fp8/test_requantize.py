"""Row ranges and the way back to FP8: bytes that did not change come back, those that did get a scale of their own."""

from __future__ import annotations

import pytest
import torch

from ostro.fp8.quantize import FP8_DTYPE, FP8_MAX, dequantize, quantize, requantize, scale_of_rows

# every byte but the two nans
FINITE = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8).view(2, 127)
SHAPES = [(), (1,), (1, 1), (6,), (6, 1), (3, 4), (2, 1)]


def scale(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)


def bytes_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_comes_back_with_every_scale(dtype: torch.dtype) -> None:
    stored = FINITE.view(FP8_DTYPE)
    drawn = torch.Generator().manual_seed(1)
    # 400 mantissas at random, the smallest and largest of them, over the exponents of the guarantee
    mantissas = [1.0, 2 - 2.0**-23, *(1 + torch.rand(400, generator=drawn)).tolist()]
    exponents = [-117, -60, -30, -14, -9, 0, 7, 60, 117]
    for number, mantissa in enumerate(mantissas):
        exponent = exponents[number % len(exponents)]
        for scale_dtype in (torch.float32, torch.bfloat16):
            old = torch.tensor(mantissa * 2.0**exponent).to(scale_dtype)
            again, kept = requantize(dequantize(stored, old, dtype), old)
            assert torch.equal(bytes_of(again), FINITE), (mantissa, exponent, scale_dtype)
            assert torch.equal(kept, old)
            assert kept.dtype == scale_dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_unchanged_weights_come_back_with_every_shape_of_scale(
    shape: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    stored = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(FP8_DTYPE)
    old = scale(shape, scale_dtype)
    again, kept = requantize(dequantize(stored, old), old)
    assert torch.equal(bytes_of(again), bytes_of(stored))
    assert torch.equal(kept, old)
    assert (kept.shape, kept.dtype) == (old.shape, old.dtype)


def test_changed_blocks_get_a_scale_and_others_keep_theirs() -> None:
    stored = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(FP8_DTYPE)
    old = scale((3, 2))
    weight = dequantize(stored, old)
    weight[2, 5] = 30.0  # block (1, 1)
    again, new = requantize(weight, old)
    assert new[1, 1].item() == pytest.approx(30.0 / FP8_MAX)
    unchanged = torch.ones(3, 2, dtype=torch.bool)
    unchanged[1, 1] = False
    assert torch.equal(new[unchanged], old[unchanged])
    per_element = unchanged.repeat_interleave(2, 0).repeat_interleave(4, 1)
    assert torch.equal(bytes_of(again)[per_element], bytes_of(stored)[per_element])
    # half a step of three bits of mantissa, or of the smallest value
    error = (dequantize(again, new, torch.float32) - weight.float()).abs()
    assert bool((error <= (weight.float().abs() / 16).clamp_min(30.0 / FP8_MAX * 2.0**-10)).all())


def test_a_changed_weight_is_quantised_as_a_new_one() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    again, new = requantize(weight, torch.tensor(0.3))
    expected, expected_scale = quantize(weight)
    assert torch.equal(bytes_of(again), bytes_of(expected))
    assert torch.equal(new, expected_scale)


def test_a_large_weight_is_taken_in_pieces() -> None:
    stored = torch.randn(5, 1 << 19, generator=torch.Generator().manual_seed(0)).to(FP8_DTYPE)
    weight = dequantize(stored, torch.tensor(0.3))
    assert torch.equal(bytes_of(requantize(weight, torch.tensor(0.3))[0]), bytes_of(stored))
    weight[4, 0] = 1000.0
    again, new = requantize(weight, torch.tensor(0.3))
    assert torch.equal(bytes_of(again), bytes_of((weight.float() / new).to(FP8_DTYPE)))
    assert new.item() == pytest.approx(1000.0 / FP8_MAX, rel=1e-2)  # 1000 in bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_fp8_cannot_hold_is_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="infinite or nan"):
        requantize(weight, torch.tensor(1.0))


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match="weight: must be"):
        requantize(torch.ones(4, 4, dtype=torch.int32), torch.tensor(1.0))
    with pytest.raises(ValueError, match="does not divide"):
        requantize(torch.ones(4, 4), torch.ones(3, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_dequantised_by_themselves(shape: tuple[int, ...]) -> None:
    stored = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(FP8_DTYPE)
    whole = dequantize(stored, scale(shape))
    for rows in (torch.arange(2, 5), torch.tensor([5, 0, 3])):
        part = dequantize(stored.view(torch.uint8)[rows].view(FP8_DTYPE), scale_of_rows(scale(shape), (6, 8), rows))
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("shape", [(), (6, 1)])
def test_the_result_goes_where_it_is_asked(shape: tuple[int, ...]) -> None:
    stored = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(FP8_DTYPE)
    for out in (torch.empty(6, 8, dtype=torch.bfloat16), torch.empty(8, 6, dtype=torch.bfloat16).t()):
        assert dequantize(stored, scale(shape), out=out) is out
        assert torch.equal(out, dequantize(stored, scale(shape)))
    with pytest.raises(TypeError, match=r"out: must be torch\.bfloat16"):
        dequantize(stored, scale(shape), out=torch.empty(6, 8))
    with pytest.raises(ValueError, match=r"out: must be \[6, 8\]"):
        dequantize(stored, scale(shape), out=torch.empty(8, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0, 1])
def test_large_weights_are_looked_up_in_pairs(dtype: torch.dtype, offset: int) -> None:
    codes = torch.randint(0, 256, ((1 << 19) + 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = codes[offset : offset + (1 << 19)].view(FP8_DTYPE).view(2, -1)
    expected = (stored.float() * 0.3).to(dtype)
    assert torch.equal(dequantize(stored, torch.tensor(0.3), dtype).nan_to_num(7.0), expected.nan_to_num(7.0))

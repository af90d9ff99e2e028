"""FP8 against float64 truth: every byte, every shape of scale, and the error of rounding."""

from __future__ import annotations

import pytest
import torch

from ostro.fp8.quantize import FP8_DTYPE, FP8_MAX, dequantize, quantize

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(16, 16).view(FP8_DTYPE)
SCALES = (0.0123456789, 1.0, 3.7e-5, 1e30)


def byte_value(byte: int) -> float:
    """A float8_e4m3fn byte by its definition: sign, 4 exponent bits (bias 7), 3 of mantissa; 0x7f is nan."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 0xF, byte & 0x7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def truth(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The exact product in float64."""
    values = torch.tensor(
        [byte_value(byte) for byte in weight.view(torch.uint8).flatten().tolist()], dtype=torch.float64
    )
    return values.view(weight.shape) * scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
def test_every_byte_is_the_float32_product_rounded_once(scale: float, dtype: torch.dtype) -> None:
    scale_tensor = torch.tensor(scale)
    expected = truth(EVERY_BYTE, scale_tensor).float().to(dtype)  # a 4-bit by 24-bit product: float32 rounds it once
    assert torch.equal(dequantize(EVERY_BYTE, scale_tensor, dtype).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert dequantize(EVERY_BYTE, scale_tensor, dtype).dtype == dtype


def test_default_is_bfloat16_and_not_the_product_of_bfloat16s() -> None:
    weight, scale = torch.full((1, 1), -240.0).to(FP8_DTYPE), torch.tensor(1e-5)
    assert dequantize(weight, scale).item() == torch.tensor(-240.0 * 1e-5).bfloat16().item()
    assert dequantize(weight, scale).item() != (weight.bfloat16() * scale.bfloat16()).item()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (3, 4), (1, 8), (6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_of_scale(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator).to(FP8_DTYPE)
    scale = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    full = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(-1, 1) if scale.dim() == 1 else scale
    full = full.repeat_interleave(6 // full.shape[0], 0).repeat_interleave(8 // full.shape[1], 1)
    assert torch.equal(dequantize(weight, scale, torch.float32), truth(weight, full).float())


def test_layout_in_memory_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 6, generator=generator).to(FP8_DTYPE).t()
    assert not weight.is_contiguous()
    for scale in (torch.tensor(0.3), torch.rand(6, 1, generator=generator)):
        assert torch.equal(dequantize(weight, scale), dequantize(weight.contiguous(), scale))


def test_more_elements_than_a_chunk() -> None:
    weight = torch.randn(1025, 1030, generator=torch.Generator().manual_seed(2)).to(FP8_DTYPE)
    scale = torch.tensor(0.017)
    assert torch.equal(dequantize(weight, scale), (weight.float() * scale).bfloat16())


def test_no_rows() -> None:
    assert dequantize(EVERY_BYTE[:0], torch.tensor(1.0)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rounds_to_the_nearest_value(dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 48, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)
    stored, scale = quantize(weight)
    assert (stored.dtype, stored.shape, scale.dtype, scale.shape) == (FP8_DTYPE, weight.shape, torch.float32, ())
    assert scale.item() == pytest.approx(weight.abs().max().item() / FP8_MAX, rel=1e-6)
    assert stored.float().abs().max() == FP8_MAX
    # all finite values, exactly; the nearest of them is at most this far away (1e-6: float32 division before rounding)
    values = torch.tensor([byte_value(byte) for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.float64)
    wanted = weight.double() / scale.double()
    best = (wanted.unsqueeze(-1) - values).abs().amin(-1)
    assert ((truth(stored, torch.tensor(1.0)) - wanted).abs() <= best + 1e-6 * wanted.abs()).all()


def test_quantize_is_stable() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(4))
    stored, scale = quantize(weight)
    again, scale_again = quantize(dequantize(stored, scale, torch.float32))
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))
    assert torch.allclose(scale_again, scale, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_quantize_extremes(value: float) -> None:
    stored, scale = quantize(torch.full((2, 3), value))
    assert scale > 0
    assert torch.isfinite(stored.float()).all()
    assert torch.allclose(dequantize(stored, scale, torch.float32), torch.full((2, 3), value), rtol=0.07, atol=1e-38)


def test_wrong_input_is_refused() -> None:
    scale = torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"weight: must be torch.float8_e4m3fn, got torch.bfloat16"):
        dequantize(torch.ones(2, 2, dtype=torch.bfloat16), scale)
    with pytest.raises(TypeError, match=r"scale: must be float32, bfloat16 or float16, got torch.int64"):
        dequantize(EVERY_BYTE, torch.tensor(1))
    with pytest.raises(ValueError, match=r"weight: must be \[out, in\], got \(256,\)"):
        dequantize(EVERY_BYTE.flatten(), scale)
    for shape in [(3,), (8,), (5, 16), (16, 3), (2, 2, 2), (1, 1, 1), (0, 4)]:
        with pytest.raises(ValueError, match=r"^scale: .*16"):
            dequantize(EVERY_BYTE, torch.ones(shape))


def test_a_weight_that_fp8_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"weight: must be float64, float32, bfloat16 or float16, got torch.int32"):
        quantize(torch.ones(2, 2, dtype=torch.int32))
    for shape in [(4,), (), (0, 4), (2, 2, 2)]:
        with pytest.raises(ValueError, match=r"weight: must be \[out, in\] with at least one element"):
            quantize(torch.ones(shape))
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"infinite or nan"):
            quantize(torch.tensor([[1.0, value]]))

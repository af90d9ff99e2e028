"""FP8 weights to real ones and back: `quantize(weight)`, `dequantize(weight, scale)`.

Pure functions on tensors; files and key names are left to `ostro.checkpoint`. The idea: a stored value is one byte in
float8_e4m3fn (4 exponent bits, 3 of mantissa, largest value 448, no infinity), and the real value is the stored one
times a scale. The product is taken in float32 and rounded once into the result's type, since bfloat16 x bfloat16 rounds
the scale first and then gives another weight. With one scale for the whole tensor only 256 results exist, so on a CPU
they are computed once and looked up, which is several times faster than converting every byte.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv:2209.05433), table 1; the Mistral-3 files
(`weight_scale_inv`, which multiplies).
"""

from __future__ import annotations

import torch

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite value of `FP8_DTYPE`."""

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements looked up at once: their int32 indices (4 MiB) stay in the cache of one core.
_CHUNK_ELEMENTS = 1 << 20


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to FP8 with one scale: `scale = max|weight| / 448`, stored value `weight / scale` to the nearest.

    Args:
        weight: `[out, in]`, floating point, finite.

    Returns:
        The stored weight `[out, in]` float8_e4m3fn, and the scale, 0-d float32, > 0 (the smallest normal float32 for a
        weight of zeros).

    Raises:
        TypeError: When the weight is not float64, float32, bfloat16 or float16.
        ValueError: When it has other than two dims, no element, or an infinite or nan one.
    """
    if weight.dtype not in (torch.float64, *_SCALE_DTYPES):
        raise TypeError(f"weight: must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight: must be [out, in] with at least one element, got {tuple(weight.shape)}")
    largest = weight.detach().abs().amax().float()
    if not torch.isfinite(largest):
        raise ValueError("weight: has infinite or nan elements, which FP8 cannot hold")
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight.detach().float() / scale).to(FP8_DTYPE), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The real weight: `(weight.float() * scale.float()).to(dtype)`, a scale per tensor, per row or per block.

    Args:
        weight: `[out, in]` float8_e4m3fn.
        scale: 0-d or `(1,)` for the tensor; `(out,)` or `(out, 1)` for its rows; `(R, C)` for R x C equal blocks.
            float32, bfloat16 or float16.
        dtype: Type of the result.

    Returns:
        `[out, in]` in `dtype`, on the device of `weight`.

    Raises:
        TypeError: When the weight is not float8_e4m3fn, or the scale is of another type.
        ValueError: When the weight has other than two dims, or the scale's shape does not divide it.
    """
    if weight.dtype != FP8_DTYPE:
        raise TypeError(f"weight: must be {FP8_DTYPE}, got {weight.dtype}")
    if scale.dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale: must be float32, bfloat16 or float16, got {scale.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: must be [out, in], got {tuple(weight.shape)}")
    scale = scale.detach().float()
    if scale.numel() == 1 and scale.dim() <= 2:
        scale = scale.reshape(())
        return _look_up(weight, scale, dtype) if weight.device.type == "cpu" else (weight.float() * scale).to(dtype)
    num_rows, num_columns = weight.shape
    grid = scale.unsqueeze(1) if scale.dim() == 1 else scale
    if grid.dim() != 2 or not all(grid.shape) or num_rows % grid.shape[0] or num_columns % grid.shape[1]:
        raise ValueError(
            f"scale: shape {tuple(scale.shape)} does not divide a weight of shape {tuple(weight.shape)}; "
            f"expected (), (1,), ({num_rows},), ({num_rows}, 1) or a grid of equal blocks"
        )
    if scale.dim() == 1 and scale.shape[0] != num_rows:
        raise ValueError(f"scale: must have one entry, or one per row ({num_rows}), got {scale.shape[0]}")
    blocks_RrCc = weight.float().reshape(
        grid.shape[0], num_rows // grid.shape[0], grid.shape[1], num_columns // grid.shape[1]
    )
    return (blocks_RrCc * grid[:, None, :, None]).to(dtype).reshape(num_rows, num_columns)


def _look_up(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantises by a table of the 256 possible results."""
    stored_values = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    table = (stored_values * scale).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    codes = weight.contiguous().view(torch.uint8).flatten()
    for codes_chunk, result_chunk in zip(
        codes.split(_CHUNK_ELEMENTS), result.view(-1).split(_CHUNK_ELEMENTS), strict=True
    ):
        torch.index_select(table, 0, codes_chunk.int(), out=result_chunk)
    return result

"""FP8 weights to real ones and back: `quantize(weight)`, `dequantize(weight, scale)`, `requantize(weight, scale)`.

Pure functions on tensors; files and key names are left to `ostro.checkpoint`. The idea: a stored value is one byte in
float8_e4m3fn (4 exponent bits, 3 of mantissa, largest value 448, no infinity), and the real value is the stored one
times a scale. The product is taken in float32 and rounded once into the result's type, since bfloat16 x bfloat16 rounds
the scale first and then gives another weight. With one scale for the whole tensor only 256 results exist, so on a CPU
they are computed once and looked up, which is several times faster than converting every byte; two bytes at a time for
large weights.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv:2209.05433), table 1; the Mistral-3 files
(`weight_scale_inv`, which multiplies).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite value of `FP8_DTYPE`."""

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Look-ups made at once: their int32 indices (1 MiB) stay in the cache of one core.
_LOOK_UPS = 1 << 18
# Elements requantised at once, in float32.
_CHUNK_ELEMENTS = 1 << 20
# Elements from which the larger table of pairs is made (0.1 ms) to halve the number of look-ups; and the type that two
# results make, by the bytes of one.
_PAIRS_FROM = 1 << 19
_PAIR_DTYPES = {2: torch.int32, 4: torch.int64}


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


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The real weight: `(weight.float() * scale.float()).to(dtype)`, a scale per tensor, per row or per block.

    Args:
        weight: `[out, in]` float8_e4m3fn.
        scale: 0-d or `(1,)` for the tensor; `(out,)` or `(out, 1)` for its rows; `(R, C)` for R x C equal blocks.
            float32, bfloat16 or float16.
        dtype: Type of the result.
        out: Where to write the result, `[out, in]` of type `dtype` on the device of `weight`; new memory when None.

    Returns:
        `[out, in]` in `dtype`, on the device of `weight`; `out` itself where it was given.

    Raises:
        TypeError: When the weight is not float8_e4m3fn, the scale is of another type, or `out` is not of type `dtype`.
        ValueError: When the weight has other than two dims, the scale's shape does not divide it, or `out` has another
            shape.
    """
    if weight.dtype != FP8_DTYPE:
        raise TypeError(f"weight: must be {FP8_DTYPE}, got {weight.dtype}")
    grid = _scale_grid(scale, weight.shape)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.dtype != dtype:
        raise TypeError(f"out: must be {dtype}, got {out.dtype}")
    if out.shape != weight.shape:
        raise ValueError(f"out: must be {list(weight.shape)}, got {list(out.shape)}")
    if grid.numel() == 1 and weight.device.type == "cpu":
        if out.is_contiguous():
            _look_up(weight, grid, out)
        else:
            out.copy_(_look_up(weight, grid, torch.empty(weight.shape, dtype=dtype)))
        return out
    return out.copy_(_times(weight.float(), grid))


def scale_of_rows(scale: torch.Tensor, shape: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
    """The scale of some rows of a weight, so that any part of it can be dequantised by itself.

    `dequantize(weight[rows], scale_of_rows(scale, weight.shape, rows))` equals `dequantize(weight, scale)[rows]`.

    Args:
        scale: Of the whole weight, in any form that `dequantize` takes.
        shape: `[out, in]`, of the whole weight.
        rows: `[N]` int64, row numbers in any order.

    Returns:
        0-d float32 for one scale, else `[N, C]` float32.

    Raises:
        TypeError: When the scale is of another type.
        ValueError: When its shape does not divide the weight.
    """
    grid = _scale_grid(scale, shape)
    if grid.numel() == 1:
        return grid.reshape(())
    return grid[rows.to(grid.device) // (shape[0] // grid.shape[0])]


def requantize(weight: torch.Tensor, scale_like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight back to FP8, with scales in the form of those it was stored with.

    What did not change comes back byte by byte: a block whose values are those that `dequantize` makes of some bytes
    and its old scale keeps that scale and gets those bytes. They are the ones it was read from: rounding to bfloat16
    moves `value * scale` by at most 2^-9 of itself, and two values of the format are at least 1/15 apart, relative, so
    the quotient rounds to the value it came from. (For scales from 2^-117 to 2^119; outside, products leave the normal
    range of bfloat16.) Any other block gets a new scale, `max|block| / 448`, in the old one's type.

    Args:
        weight: `[out, in]` floating point, finite.
        scale_like: The scale it was stored with, in any form that `dequantize` takes.

    Returns:
        The stored weight `[out, in]` float8_e4m3fn, and the scale in shape and type of `scale_like`.

    Raises:
        TypeError: When the weight or the scale is of another type.
        ValueError: When the scale's shape does not divide the weight, or an element is infinite or nan.
    """
    if weight.dtype not in (torch.float64, *_SCALE_DTYPES):
        raise TypeError(f"weight: must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    weight = weight.detach()
    grid = _scale_grid(scale_like, weight.shape).to(weight.device)
    stored = torch.empty(weight.shape, dtype=FP8_DTYPE, device=weight.device)
    same, largest = (torch.empty(weight.shape[0], grid.shape[1], device=weight.device) for _ in range(2))
    for rows in _row_pieces(weight.shape):
        values = weight[rows].float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("weight: has infinite or nan elements, which FP8 cannot hold")
        scale = _of_rows(grid, weight.shape[0], rows)
        stored[rows] = _round(values, scale)
        again = _times(stored[rows].float(), scale).to(weight.dtype)
        same[rows] = _blocks(again == weight[rows], scale).all(3).all(1).float()
        largest[rows] = _blocks(values, scale).abs().amax((1, 3))
    per_block = (grid.shape[0], -1, grid.shape[1])
    kept = same.view(per_block).amin(1).bool()
    fresh = (largest.view(per_block).amax(1) / FP8_MAX).clamp_min(torch.finfo(scale_like.dtype).tiny)
    grid = torch.where(kept, grid, fresh.to(scale_like.dtype).float())
    if not bool(kept.all()):
        for rows in _row_pieces(weight.shape):
            stored[rows] = _round(weight[rows].float(), _of_rows(grid, weight.shape[0], rows))
    return stored, grid.to(scale_like.dtype).reshape(scale_like.shape)


def _row_pieces(shape: Sequence[int]) -> Iterator[slice]:
    """Row ranges of at most `_CHUNK_ELEMENTS` elements, so that float32 copies stay small."""
    step = max(1, _CHUNK_ELEMENTS // max(1, shape[1]))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def _of_rows(grid: torch.Tensor, num_rows: int, rows: slice) -> torch.Tensor:
    """The scale `[N, C]` of each of `rows`."""
    return grid[torch.arange(rows.start, rows.stop, device=grid.device) // (num_rows // grid.shape[0])]


def _round(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float32 values to the nearest FP8 ones; the clamp is for a scale that was itself rounded down."""
    quotient = _blocks(values, scale) / _per_block(scale)
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).view(values.shape)


def _times(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (_blocks(values, scale) * _per_block(scale)).view(values.shape)


def _scale_grid(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A scale as a float32 grid `[R, C]` of equal blocks of a weight."""
    if scale.dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale: must be float32, bfloat16 or float16, got {scale.dtype}")
    return scale.detach().float().reshape(check_scale_shape(scale.shape, shape))


def check_scale_shape(scale_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """The grid of equal blocks that a scale stands for.

    Args:
        scale_shape: Shape of the scale.
        shape: Shape of the weight.

    Returns:
        Rows and columns of blocks: (1, 1) for one scale, (out, 1) for one per row.

    Raises:
        ValueError: When the weight has other than two dims, or the scale's shape does not divide it.
    """
    if len(shape) != 2:
        raise ValueError(f"weight: must be [out, in], got {tuple(shape)}")
    if math.prod(scale_shape) == 1 and len(scale_shape) <= 2:
        return 1, 1
    num_rows, num_columns = shape
    if len(scale_shape) == 1 and scale_shape[0] != num_rows:
        raise ValueError(f"scale: must have one entry, or one per row ({num_rows}), got {scale_shape[0]}")
    grid = (*scale_shape, 1) if len(scale_shape) == 1 else tuple(scale_shape)
    if len(grid) != 2 or not all(grid) or num_rows % grid[0] or num_columns % grid[1]:
        raise ValueError(
            f"scale: shape {tuple(scale_shape)} does not divide a weight of shape {tuple(shape)}; "
            f"expected (), (1,), ({num_rows},), ({num_rows}, 1) or a grid of equal blocks"
        )
    return grid[0], grid[1]


def _blocks(weight: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """`[out, in]` as blocks `[R, out / R, C, in / C]`."""
    num_rows, num_columns = weight.shape
    return weight.reshape(grid.shape[0], num_rows // grid.shape[0], grid.shape[1], num_columns // grid.shape[1])


def _per_block(grid: torch.Tensor) -> torch.Tensor:
    """A grid `[R, C]` so that it broadcasts against blocks."""
    return grid[:, None, :, None]


def _look_up(weight: torch.Tensor, scale: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Dequantises by a table of the 256 possible results, or where it pays of the 65,536 possible pairs of results."""
    stored_values = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    table = (stored_values * scale.reshape(())).to(result.dtype)
    codes, values = weight.contiguous().view(torch.uint8).flatten(), result.view(-1)
    aligned = all(not (part.numel() % 2 or part.storage_offset() % 2) for part in (codes, values))
    if aligned and codes.numel() >= _PAIRS_FROM and result.dtype.itemsize in _PAIR_DTYPES:
        pair = _PAIR_DTYPES[result.dtype.itemsize]
        every_pair = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
        table = table.index_select(0, every_pair.int()).view(pair)
        codes, values = codes.view(torch.uint16), values.view(pair)
    indices = torch.empty(min(_LOOK_UPS, codes.numel()), dtype=torch.int32)
    for codes_chunk, values_chunk in zip(codes.split(_LOOK_UPS), values.split(_LOOK_UPS), strict=True):
        chunk = indices[: codes_chunk.numel()].copy_(codes_chunk)
        torch.index_select(table, 0, chunk, out=values_chunk)
    return result

"""Products with the output head, tile by tile, with float32 results whatever the dtype of the operands.

This file knows nothing of losses: `linear_ce` walks the tiles and says what is multiplied.

The idea: a bfloat16 product rounds its result to 8 bits although it was summed in float32. CUDA can be asked for the
sums as they are. The CPU cannot; but its float32 product may use the bfloat16 units, which rounds the operands and
keeps the sums, and operands that are bfloat16 values lose nothing by it. So the CPU gets each tile of the head copied
to float32, a few MiB at a time. Where the processor has no bfloat16 units it is a float32 product.

Shapes: V rows of the head, H hidden size, K rows of one tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ostro.models.cpu_linear import round_rows

# A tile of the head as float32 takes 16 MiB, whatever the hidden size: the fastest of 16, 32 and 64.
_TILE_ELEMENTS = 2**22


class TiledHead:
    """The rows of a head in tiles, and products of operands with results in `sum_dtype`.

    Attributes:
        sum_dtype: float32, or float64 if computed in that: the dtype of results.
        operand_dtype: The dtype `product` and `add_product` take their operands in.
    """

    def __init__(self, weight_VH: torch.Tensor, compute_dtype: torch.dtype) -> None:
        """Allocates the memory of one tile.

        Args:
            weight_VH: `[V, H]` rows of the head.
            compute_dtype: What operands are rounded to.
        """
        self.sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        self._weight_VH, self._compute_dtype = weight_VH, compute_dtype
        self.operand_dtype = compute_dtype if weight_VH.is_cuda else self.sum_dtype
        self._tile_rows = max(_TILE_ELEMENTS // max(weight_VH.shape[1], 1), 1)
        num_rows = 0 if weight_VH.dtype == self.operand_dtype else min(self._tile_rows, len(weight_VH))
        self._memory = weight_VH.new_empty(num_rows, weight_VH.shape[1], dtype=self.operand_dtype)

    def round_rows(self, num_rows: int) -> int:
        """The rows that the left operand of a product should be filled up to, see `cpu_linear.round_rows`."""
        return round_rows(num_rows) if self.operand_dtype != self._compute_dtype else num_rows

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First row of each tile, and the one after its last.

        Yields:
            `(start, end)`.
        """
        for start in range(0, len(self._weight_VH), self._tile_rows):
            yield start, min(start + self._tile_rows, len(self._weight_VH))

    def tile(self, start: int, end: int) -> torch.Tensor:
        """Rows `start` to `end`, `[K, H]`, as an operand that is valid until the next call."""
        rows_KH = self._weight_VH[start:end]
        if rows_KH.dtype == self.operand_dtype:
            return rows_KH
        return self._memory[: end - start].copy_(rows_KH.to(self._compute_dtype))

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` rounded to the compute dtype, as an operand."""
        return tensor.to(self._compute_dtype).to(self.operand_dtype)

    def product(self, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        """`out = left @ right`, with `out` in `sum_dtype`."""
        if left.dtype == out.dtype:
            torch.mm(left, right, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """`total += left @ right`, with `total` in `sum_dtype`."""
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)


@contextlib.contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 products on the CPU use its bfloat16 units while their operands are bfloat16 values anyway.

    The setting is the process's: another thread's float32 products would be rounded too while it lasts.
    """
    if dtype != torch.bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a module that makes up its attributes
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before

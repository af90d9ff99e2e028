"""Linear layers on the CPU: float32 through oneDNN, forward and backward, where torch's own path is slow; and the
numbers of rows that low-precision products should come in.

torch hands float32 products to MKL. MKL looks at the maker of the processor: on Intel it reaches the peak (215 GFLOP/s
per core), on others it takes slower code (AMD: 100, where oneDNN reaches 244); bfloat16 goes to oneDNN by itself. The
idea: torch's linear takes the oneDNN path, gradients included, when its input has the oneDNN layout, so the input is
converted on the way in and the output on the way out. On Intel the conversions would cost a fifth of the speed. Results
differ from MKL's by float32 rounding.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F


class OneDnnLinear(torch.nn.Linear):
    """`torch.nn.Linear` whose float32 products on the CPU are oneDNN's; elsewhere it is the plain layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T`, `[..., in]` to `[..., out]`."""
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        # a vector, an empty batch, a DTensor or what a compiler sees has no oneDNN form
        plain = plain or torch.compiler.is_compiling()
        if plain or type(input) is not torch.Tensor or input.ndim < 2 or input.numel() == 0:
            return super().forward(input)
        return F.linear(input.to_mkldnn(), self.weight).to_dense()


def round_rows(num_rows: int) -> int:
    """The next round number of rows, larger by at most a sixteenth (or 7), for low-precision products on the CPU.

    oneDNN compiles a kernel for every number of rows that it meets (about 1.4 ms and 0.4 MiB each, 12 for a layer and
    its gradients) and keeps the last 1024: with a number for every batch, that was the larger part of a step's memory.

    Args:
        num_rows: Rows of the input, >= 0.
    """
    step = max(8, 1 << max(num_rows.bit_length() - 5, 0))
    return num_rows + -num_rows % step


@functools.cache
def onednn_is_faster(cpu_facts: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether float32 products are faster through oneDNN on this processor: decided by its maker, so that one machine
    always computes the same.

    Args:
        cpu_facts: What Linux says of the processors; where there is no such file, torch's own path is kept.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpu_facts.exists()):
        return False
    maker = re.search(r"^vendor_id\s*:\s*(\S+)", cpu_facts.read_text(encoding="utf-8"), re.MULTILINE)
    return maker is not None and maker[1] != "GenuineIntel"


def use_onednn(model: torch.nn.Module) -> None:
    """Replaces the linear layers of `model` that have no bias; weights and their names stay the same.

    Args:
        model: Any module.
    """
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module.bias is None:
            with torch.device("meta"):  # type: ignore[unreachable]  # the bias is annotated as always there
                layer = OneDnnLinear(module.in_features, module.out_features, bias=False)
            layer.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)

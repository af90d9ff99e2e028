"""On a CUDA device a folder becomes the model that it becomes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostro.checkpoint import reader
from ostro.checkpoint.load import load_vlm
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("piece_bytes", [200, 1 << 25])
@pytest.mark.parametrize("form", ["tensor", "row", "block", "native"])
def test_a_device_reads_what_a_cpu_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, piece_bytes: int
) -> None:
    folder = tmp_path
    write_fp8_folder(folder, layout="identity", scale_shape=form if form in ("row", "block") else ())
    if form == "native":
        folder = tmp_path / "native"
        write_native_folder(folder, tmp_path)
    monkeypatch.setattr(reader, "_DEVICE_PIECE_BYTES", piece_bytes)
    expected, model = load_vlm(folder), load_vlm(folder, device="cuda")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    for name, weight in (*expected.named_parameters(), *expected.named_buffers()):
        assert torch.equal(
            model.get_parameter(name).cpu() if weight.requires_grad else model.get_buffer(name).cpu(), weight
        )

"""What is read in many pieces is what is read in one; nothing is mapped, and storage delivers what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ostro.checkpoint import reader
from ostro.checkpoint.load import load_vlm
from ostro.checkpoint.reader import Fp8StorageReader
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder


@pytest.mark.parametrize("piece_bytes", [1, 70, 600])
@pytest.mark.parametrize("form", ["tensor", "row", "block", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, form: str, dtype: torch.dtype
) -> None:
    folder = tmp_path
    write_fp8_folder(folder, layout="identity", scale_shape=form if form in ("row", "block") else ())
    expected = load_vlm(folder, dtype=dtype).state_dict()
    if form == "native":
        folder = tmp_path / "native"
        write_native_folder(folder, tmp_path)
    monkeypatch.setattr(reader, "_CPU_PIECE_BYTES", piece_bytes)
    for name, weight in load_vlm(folder, dtype=dtype).state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_every_weight_is_one_whole_tensor_of_the_final_type(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, num_shards=3)
    metadata = Fp8StorageReader(tmp_path, dtype=torch.float32).read_metadata().state_dict_metadata
    parameters = load_vlm(tmp_path).state_dict()
    assert metadata.keys() == parameters.keys() - {"lm_head.weight"}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        assert entry.size == parameters[name].shape
        assert [chunk.sizes for chunk in entry.chunks] == [parameters[name].shape]
        assert entry.properties.dtype == torch.float32


def test_no_file_is_mapped_or_left_open(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    model = load_vlm(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]
    assert all(parameter.untyped_storage().size() >= parameter.nbytes for parameter in model.parameters())


def test_scales_are_kept_as_stored(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, scale_shape=(1,), scale_dtype=torch.bfloat16)
    adapter = load_vlm(tmp_path).state_dict_adapter
    assert len(adapter.scales) == len(adapter.activation_scales) == 14
    assert {(scale.dtype, scale.shape) for scale in adapter.scales.values()} == {(torch.bfloat16, (1,))}
    assert {(scale.dtype, scale.item()) for scale in adapter.activation_scales.values()} == {(torch.float32, 0.5)}


def test_the_native_layout_needs_the_size_of_a_head(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source", layout="identity")
    write_native_folder(tmp_path, tmp_path / "source")
    with pytest.raises(ValueError, match="head_dim: needed"):
        Fp8StorageReader(tmp_path)._unit("model.language_model.layers.0.self_attn.q_proj.weight")

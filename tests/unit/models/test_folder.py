"""Bad folders and bad weights files are named before transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ostro.errors import CheckpointError, LayoutError
from ostro.models.folder import check_weights_folder, is_local, read_dtypes, read_header
from tests.helpers.fp8_folder import save_shards


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3), "empty": torch.ones(0)}, file, {"format": "pt"})
    return file


@pytest.fixture
def folder(weights_file: Path) -> Path:
    (weights_file.parent / "config.json").write_text("{}")
    return weights_file.parent


def test_a_whole_file_passes(weights_file: Path, tmp_path: Path) -> None:
    assert read_dtypes(weights_file) == {"a": "F32", "b": "F32", "empty": "F32"}
    save_file({}, tmp_path / "none.safetensors")
    assert read_dtypes(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("cut", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named(weights_file: Path, cut: int) -> None:
    weights_file.write_bytes(weights_file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has \d+ bytes, its header promises \d+"):
        read_dtypes(weights_file)


@pytest.mark.parametrize("header", [b"not json", b"\xff\xfe{}", b'{"a": {"dtype": "F32"}}', b'{"a": 3}', b"[]"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
        read_dtypes(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"shape":[2,3]', b'"shape":[2,7]', r"the header is damaged: b is F32 \[2, 7\], so 56 bytes, and is given 24"),
        (b'"dtype":"F32","shape":[2,3]', b'"dtype":"F16","shape":[2,3]', "b is F16"),
        (b'"data_offsets":[0,24]', b'"data_offsets":[8,32]', "a begins at byte .*, the one before it ends at"),
        (b'"data_offsets"', b'"data_offsEts"', "not a safetensors file"),
        (b'"F32"', b'"F3\xb2"', "not a safetensors file"),
    ],
)
def test_a_flipped_bit_in_the_header_is_found(weights_file: Path, old: bytes, new: bytes, message: str) -> None:
    content = weights_file.read_bytes()
    assert old in content
    weights_file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_dtypes(weights_file)


def test_every_flipped_bit_of_a_header_is_found_or_renames_a_tensor(weights_file: Path) -> None:
    content = weights_file.read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    names = []
    for place in range(8 * (8 + header_size)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        weights_file.write_bytes(flipped)
        try:
            header = read_header(weights_file)
        except CheckpointError:
            continue
        # what is left describes the same bytes: under another name, or with the metadata or an empty tensor changed
        begins = [entry.begin for entry in header.values() if entry.end > entry.begin]
        assert begins == [8 + header_size, 32 + header_size]
        names.append(set(header))
    assert len(names) < 8 * header_size / 2


def test_a_whole_folder_passes(folder: Path) -> None:
    check_weights_folder(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read \(No such file"):
        check_weights_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index"):
        check_weights_folder(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_fp8_weight_without_scale_is_named(folder: Path, shards: int) -> None:
    fp8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
    scaled = {"q_proj.weight": fp8, "q_proj.weight_scale_inv": torch.tensor(2.0)}
    save_shards(folder, scaled, shards)
    check_weights_folder(folder)
    save_shards(folder, scaled | {"k_proj.weight": fp8.clone()}, shards)
    with pytest.raises(LayoutError, match=r"1 FP8 weights without weight_scale_inv \(k_proj\.weight\)"):
        check_weights_folder(folder)


def test_what_is_absent_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(LayoutError, match=r"no config\.json; expected a folder in Hugging Face layout"):
        check_weights_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LayoutError, match=r"no config\.json and no model\.safetensors"):
        check_weights_folder(folder)


@pytest.mark.parametrize("native", [["params.json", "consolidated.safetensors"], ["consolidated-00001.safetensors"]])
def test_a_native_only_folder_says_what_to_do(tmp_path: Path, native: list[str]) -> None:
    for name in native:
        (tmp_path / name).touch()
    with pytest.raises(LayoutError, match=r"native layout \(consolidated.*add the Hugging Face files"):
        check_weights_folder(tmp_path)


def test_names_are_told_from_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "runs").mkdir()
    assert is_local(str(folder))
    assert is_local("runs")
    assert not is_local("mistralai/Ministral-3-3B-Base-2512")
    for path in ("./nothing", "~/nothing", str(folder / "nothing"), "a/b/c", "nothing", "runs/nothing"):
        with pytest.raises(CheckpointError, match="no such folder; give a weights folder or a hub id"):
            is_local(path)
    (folder / "runs" / "first").mkdir()
    for path in ("rusn", "rusn/a/b", "runs/fisrt"):
        with pytest.raises(CheckpointError, match=r"no such folder \(nearest: runs(/first)?\)"):
            is_local(path)
    with pytest.raises(LayoutError, match=r"config\.json: is a file, expected the weights folder"):
        is_local("config.json")

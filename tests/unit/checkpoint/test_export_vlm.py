"""A vision-language model written back: the same bytes where nothing changed, and a folder that others open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3ForConditionalGeneration

from ostro.checkpoint.export_vlm import MARKER, export_vlm, verify_vlm
from ostro.checkpoint.load import load_vlm
from ostro.errors import CheckpointError
from tests.helpers.fp8_folder import edit_weights, write_fp8_folder
from tests.helpers.native_folder import write_native_folder

NUM_TEXT_LINEARS = 14


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert tensor.shape == other[key].shape, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


def change(model: torch.nn.Module, part: str) -> str:
    """Moves the first parameter whose name has `part`, and returns its name."""
    name, weight = next((name, weight) for name, weight in model.named_parameters() if part in name)
    with torch.no_grad():
        weight.mul_(1.5)
    return name


@pytest.mark.parametrize("layout", ["nested", "identity"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_an_unchanged_model_comes_back_byte_for_byte(
    layout: str, tied: bool, scale_shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_fp8_folder(tmp_path / "source", layout=layout, tie_word_embeddings=tied, scale_shape=scale_shape)
    model = load_vlm(tmp_path / "source")
    export_vlm(model, tmp_path / "source", tmp_path / "export")
    verify_vlm(tmp_path / "export", model)
    assert_same_bytes(tensors(tmp_path / "source"), tensors(tmp_path / "export"))
    source, exported = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "export"))
    assert source == exported


def test_native_comes_back_native(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "identity", layout="identity")
    write_native_folder(tmp_path / "source", tmp_path / "identity")
    model = load_vlm(tmp_path / "source")
    export_vlm(model, tmp_path / "source", tmp_path / "export")
    verify_vlm(tmp_path / "export", model)
    assert_same_bytes(tensors(tmp_path / "source"), tensors(tmp_path / "export"))
    assert load_vlm(tmp_path / "export").state_dict_adapter.layout.name == "native"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stock_transformers_opens_a_trained_export_as_the_same_model(precision: Any, tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source")
    model = load_vlm(tmp_path / "source")
    changed = [change(model, part) for part in ("vision_tower", "embed_tokens", "layers.1.mlp.up_proj")]
    export_vlm(model, tmp_path / "source", tmp_path / "export", precision=precision)
    verify_vlm(tmp_path / "export", model)
    stock, info = Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info.values())
    stored = tensors(tmp_path / "export")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == NUM_TEXT_LINEARS * (
        precision == "fp8"
    )
    for name, weight in model.named_parameters():
        exact = precision == "bf16" or name != changed[-1]
        # half a unit of FP8's last place where a weight was quantised anew
        error = (stock.get_parameter(name).float() - weight.float()).abs()
        assert bool((error <= (0 if exact else 2**-4 * weight.float().abs() + 1e-5)).all()), name
    assert not torch.equal(stock.get_parameter(changed[-1]), load_vlm(tmp_path / "source").get_parameter(changed[-1]))


def test_a_bf16_source_can_be_quantised(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "fp8")
    export_vlm(load_vlm(tmp_path / "fp8"), tmp_path / "fp8", tmp_path / "bf16", precision="bf16")
    model = load_vlm(tmp_path / "bf16")
    export_vlm(model, tmp_path / "bf16", tmp_path / "again")
    assert_same_bytes(tensors(tmp_path / "bf16"), tensors(tmp_path / "again"))
    export_vlm(model, tmp_path / "bf16", tmp_path / "quantised", precision="fp8")
    verify_vlm(tmp_path / "quantised", model)
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "dynamic"
    stored = tensors(tmp_path / "quantised")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == NUM_TEXT_LINEARS
    assert not any("activation_scale" in key for key in stored)


def test_shards_have_an_index_and_other_files_come_along(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source")
    (tmp_path / "source" / "tekken.json").write_text("{}")
    (tmp_path / "source" / "README.md").write_text("of the source")
    model = load_vlm(tmp_path / "source")
    export_vlm(model, tmp_path / "source", tmp_path / "export", max_shard_gib=2**-16)
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert_same_bytes(tensors(tmp_path / "source"), tensors(tmp_path / "export"))
    left = {path.name for path in (tmp_path / "export").iterdir() if path.suffix != ".safetensors"}
    assert left == {"config.json", "model.safetensors.index.json", "tekken.json", MARKER}


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source")
    model = load_vlm(tmp_path / "source")
    export_vlm(model, tmp_path / "source", tmp_path / "export")
    change(model, "embed_tokens")
    export_vlm(model, tmp_path / "source", tmp_path / "export")
    verify_vlm(tmp_path / "export", model)
    with pytest.raises(CheckpointError, match=r"source: exists already, expected no folder or an empty one"):
        export_vlm(model, tmp_path / "source", tmp_path / "source")


def test_a_wrong_export_is_noticed(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source")
    model = load_vlm(tmp_path / "source")
    export_vlm(model, tmp_path / "source", tmp_path / "export")
    key = "language_model.model.layers.0.mlp.up_proj.weight"

    def double_scale(weights: dict[str, torch.Tensor]) -> None:
        weights[f"{key}_scale_inv"] *= 2

    edit_weights(tmp_path / "export", double_scale)
    with pytest.raises(CheckpointError, match=r"model.language_model.layers.0.mlp.up_proj.weight is not the model's"):
        verify_vlm(tmp_path / "export", model)
    edit_weights(tmp_path / "export", lambda weights: weights.pop("vision_tower.ln_pre.weight"))
    with pytest.raises(CheckpointError, match=r"missing or unexpected weights: model.vision_tower.ln_pre.weight"):
        verify_vlm(tmp_path / "export", model)

"""Loading against transformers: the same weights and logits from every layout; and native equal to Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ostro.checkpoint.auto import AutoModelForImageTextToText
from ostro.checkpoint.load import load_vlm
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder
from tests.helpers.tiny import token_ids, vlm_config

IMAGE = 10


def config(*, tied: bool) -> Mistral3Config:
    result = vlm_config(tie_word_embeddings=tied)
    result.vision_config.hidden_act = "silu"  # as in all releases, which is what a native folder means
    return result


def inputs(*, images: bool) -> dict[str, torch.Tensor]:
    ids = token_ids([20])[0]
    if not images:
        return {"input_ids": torch.tensor([ids])}
    # two images of 84 x 56 and 56 x 56: 3 x 2 and 2 x 2 merged patches
    ids = [*ids[:5], *[IMAGE] * 6, *ids[5:12], *[IMAGE] * 4, *ids[12:]]
    pixels = torch.randn(2, 3, 84, 56, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[84, 56], [56, 56]]),
    }


@torch.no_grad()
def logits(model: Any, *, images: bool) -> torch.Tensor:
    given = inputs(images=images)
    if images:
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
    return model(**given).logits


def stock(folder: Path) -> Mistral3ForConditionalGeneration:
    return Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    weights, buffers = theirs.state_dict(), dict(theirs.named_buffers())
    assert ours.state_dict().keys() == weights.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, weights[name]), name
        assert weight.dtype == weights[name].dtype
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["nested", "identity"])
@pytest.mark.parametrize(("fp8", "num_shards"), [(True, 1), (True, 3), (False, 1)])
def test_the_model_that_transformers_loads(tmp_path: Path, layout: str, tied: bool, fp8: bool, num_shards: int) -> None:
    write_fp8_folder(
        tmp_path, layout=layout, tie_word_embeddings=tied, config=config(tied=tied), fp8=fp8, num_shards=num_shards
    )
    ours, theirs = AutoModelForImageTextToText.from_pretrained(tmp_path), stock(tmp_path)
    assert_same_weights(ours, theirs)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    assert not ours.training
    for images in (False, True):
        # one kernel on equal bits for text; images attend one by one here, and rounding of bfloat16 follows the shape
        tolerance = 0.0 if not images else 2e-2
        expected = logits(theirs, images=images)
        torch.testing.assert_close(
            logits(ours, images=images), expected, rtol=0, atol=tolerance * expected.abs().max().item()
        )


@pytest.mark.parametrize("scale_shape", [(), (1,), "row", "column of rows", "block"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_scale(tmp_path: Path, scale_shape: tuple[int, ...] | str, scale_dtype: torch.dtype) -> None:
    truth = write_fp8_folder(tmp_path, scale_shape=scale_shape, scale_dtype=scale_dtype)
    model = load_vlm(tmp_path)
    weights = model.get_submodule("model.language_model").state_dict()
    assert weights.keys() == truth.keys()
    for name, weight in truth.items():
        assert torch.equal(weights[name], weight), name
    stored = load_file(tmp_path / "model.safetensors")
    again = model.state_dict_adapter.to_hf(model.state_dict(), quantization=True)
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].shape == tensor.shape
        assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(again[key].float(), tensor.float())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_native_folder_is_the_hugging_face_one(tmp_path: Path, tied: bool, fp8: bool, num_shards: int) -> None:
    source, native = tmp_path / "source", tmp_path / "native"
    write_fp8_folder(source, layout="identity", tie_word_embeddings=tied, config=config(tied=tied), fp8=fp8)
    write_native_folder(native, source, num_shards=num_shards)
    ours, theirs = load_vlm(native), stock(source)
    assert_same_weights(ours, theirs)
    assert torch.equal(logits(ours, images=False), logits(theirs, images=False))
    assert torch.equal(logits(ours, images=True), logits(load_vlm(source), images=True))
    assert ours.state_dict_adapter.layout.name == "native"
    stored = {}
    for file in native.glob("*.safetensors"):
        stored |= load_file(file)
    again = ours.state_dict_adapter.to_hf(ours.state_dict(), quantization=fp8)
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key].float(), tensor.float()), key


def test_two_copies_are_read_once(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, layout="identity")
    write_native_folder(tmp_path, tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.safetensors", "consolidated.safetensors"}
    assert load_vlm(tmp_path).state_dict_adapter.layout.name == "identity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions_round_once(tmp_path: Path, dtype: torch.dtype) -> None:
    write_fp8_folder(tmp_path, layout="identity")
    stored = load_file(tmp_path / "model.safetensors")
    model = load_vlm(tmp_path, dtype=dtype)
    for name, weight in model.named_parameters():
        scale = stored.get(f"{name}_scale_inv", torch.tensor(1.0))
        assert torch.equal(weight, (stored[name].float() * scale).to(dtype)), name
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_the_config_that_was_read_is_left_alone(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    before = (tmp_path / "config.json").read_text()
    model = load_vlm(tmp_path)
    assert "quantization_config" not in model.config.to_dict()
    quantization = json.loads(before)["quantization_config"]
    assert quantization.items() <= (model.state_dict_adapter.quantization_config or {}).items()
    assert model.config.name_or_path == str(tmp_path)
    assert (tmp_path / "config.json").read_text() == before

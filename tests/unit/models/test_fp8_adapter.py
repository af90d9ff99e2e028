"""The adapter on dicts: names, FP8 and rows go both ways; a scale out of place is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Ministral3ForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

from ostro.checkpoint.adapter import Mistral3FP8StateDictAdapter as PublicAdapter
from ostro.checkpoint.load import load_vlm
from ostro.errors import LayoutError
from ostro.fp8.quantize import FP8_DTYPE, dequantize, quantize
from ostro.models.fp8_adapter import Mistral3FP8StateDictAdapter, to_runtime_rows, to_stored_rows
from ostro.models.layout import IDENTITY, NATIVE, TEXT_ONLY
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import interleaved
from tests.helpers.tiny import text_config, vlm_config

Tensors = dict[str, torch.Tensor]
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}
LINEAR = "language_model.model.layers.1.mlp.up_proj."


@pytest.fixture
def stored(tmp_path: Path) -> Tensors:
    write_fp8_folder(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def fp8_config(**quantization: object) -> Mistral3Config:
    config = vlm_config()
    config.quantization_config = {**FP8, **quantization}
    return config


def test_the_name_of_the_design() -> None:
    assert PublicAdapter is Mistral3FP8StateDictAdapter


def test_from_a_folder_and_back(tmp_path: Path, stored: Tensors) -> None:
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full(vlm_config())
    weights = adapter.from_hf(stored)
    model = Mistral3ForConditionalGeneration(vlm_config()).to(torch.bfloat16)
    model.load_state_dict(weights, strict=False)
    assert model.state_dict().keys() == weights.keys() | {"lm_head.weight"}
    assert torch.equal(
        weights["model.language_model.layers.1.mlp.up_proj.weight"],
        (stored[LINEAR + "weight"].float() * stored[LINEAR + "weight_scale_inv"]).bfloat16(),
    )
    again = load_vlm(tmp_path).state_dict_adapter.to_hf(model.state_dict(), quantization=True)
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].shape == tensor.shape
        assert torch.equal(again[key].float(), tensor.float())
        if tensor.dtype == FP8_DTYPE:
            assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8))


def test_without_quantization_weights_are_written_as_they_are(tmp_path: Path, stored: Tensors) -> None:
    model = load_vlm(tmp_path)
    written = model.state_dict_adapter.to_hf(model.state_dict())
    assert written.keys() == {key for key in stored if "scale" not in key}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(
        written[LINEAR + "weight"], model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    )


def test_a_trained_weight_gets_a_scale_of_its_own(tmp_path: Path, stored: Tensors) -> None:
    model = load_vlm(tmp_path)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach() * 3
    pairs = model.state_dict_adapter.convert_single_tensor_to_hf(name, weight, quantization=True)
    assert [key for key, _ in pairs] == [LINEAR + last for last in ("weight", "weight_scale_inv", "activation_scale")]
    (_, fp8), (_, scale), (_, activation_scale) = pairs
    assert torch.equal(dequantize(fp8, scale), dequantize(*quantize(weight)))
    assert torch.equal(activation_scale, stored[LINEAR + "activation_scale"])


def test_a_tied_head_is_not_written(tmp_path: Path, stored: Tensors) -> None:
    model = load_vlm(tmp_path)
    assert model.state_dict_adapter.convert_single_tensor_to_hf("lm_head.weight", model.lm_head.weight) == []


def test_fp8_weights_of_a_config_are_the_linears_not_excepted() -> None:
    linears = {
        name
        for name, module in Mistral3ForConditionalGeneration(vlm_config()).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    text = {f"{name}.weight" for name in linears if "language_model" in name}
    assert len(text) == 14
    assert Mistral3FP8StateDictAdapter.for_vlm_full(fp8_config()).fp8_names == text
    everything = Mistral3FP8StateDictAdapter.for_vlm_full(fp8_config(modules_to_not_convert=[]))
    assert everything.fp8_names == {f"{name}.weight" for name in linears}
    some = Mistral3FP8StateDictAdapter.for_vlm_full(
        fp8_config(modules_to_not_convert=["lm_head", "model.vision_tower", "multi_modal_projector", "o_proj"])
    )
    projector = {name for name in linears if "multi_modal_projector" in name}
    assert some.fp8_names == {name for name in text if "o_proj" not in name} | {f"{name}.weight" for name in projector}
    assert Mistral3FP8StateDictAdapter.for_vlm_full(vlm_config()).fp8_names == frozenset()


def test_a_model_without_a_folder_is_quantised_as_its_config_says() -> None:
    config = fp8_config()
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full(config)
    model = Mistral3ForConditionalGeneration(vlm_config())
    written = adapter.to_hf(model.state_dict(), quantization=True)
    assert sum(tensor.dtype == FP8_DTYPE for tensor in written.values()) == 14
    fp8, scale = quantize(model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight"))
    assert torch.equal(written[LINEAR + "weight"].float(), fp8.float())
    assert torch.equal(written[LINEAR + "weight_scale_inv"], scale)
    assert config.quantization_config == FP8, "the caller's config stays as it is"


def test_a_text_model() -> None:
    model = Ministral3ForCausalLM(text_config())
    adapter = Mistral3FP8StateDictAdapter.for_causal_lm()
    written = adapter.to_hf(model.state_dict())
    assert written.keys() == model.state_dict().keys()
    name = "model.layers.0.mlp.up_proj."
    written[name + "weight"], written[name + "weight_scale_inv"] = quantize(written[name + "weight"])
    weights = adapter.from_hf(written)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(
        weights[name + "weight"], dequantize(written[name + "weight"], written[name + "weight_scale_inv"])
    )
    with pytest.raises(LayoutError, match=r"fp8_names: neither a folder nor a config"):
        adapter.to_hf(model.state_dict(), quantization=True)
    with pytest.raises(LayoutError, match=r"model\.vision_tower\.patch_conv\.weight: no runtime name of the text-only"):
        adapter.from_hf(Mistral3ForConditionalGeneration(vlm_config()).state_dict())


def test_rows_of_heads_go_both_ways() -> None:
    weight = torch.randint(0, 256, (24, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = to_stored_rows(weight, 8)
    assert torch.equal(stored, interleaved(weight, 8))
    assert torch.equal(to_runtime_rows(stored, 8), weight)


def test_native_rows_depend_on_the_config() -> None:
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full().bound(
        layout=NATIVE, scales={}, activation_scales={}, is_tied=True
    )
    name = "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
    with pytest.raises(LayoutError, match="depends on the config"):
        adapter.convert_single_tensor_to_hf(name, torch.ones(32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(LINEAR + "weight_scale_inv"),
            rf"1 FP8 weights without their weight_scale_inv: {LINEAR}weight",
        ),
        (lambda t: t.pop(LINEAR + "weight"), r"1 scales of weights that are absent or not stored as FP8: .*_scale_inv"),
        (
            lambda t: t.update({LINEAR + "weight": t[LINEAR + "weight"].bfloat16()}),
            rf"absent or not stored as FP8: {LINEAR}weight_scale_inv",
        ),
        (
            lambda t: t.update({LINEAR + "weight_scale": t.pop(LINEAR + "weight_scale_inv")}),
            rf"scales of an unknown name: {LINEAR}weight_scale; expected weight_scale_inv",
        ),
        (
            lambda t: t.update({LINEAR + "weight_scale_inv": torch.ones(3, 2)}),
            rf"{LINEAR}weight_scale_inv: scale: shape \(3, 2\) does not divide a weight of shape \(64, 32\)",
        ),
        (lambda t: t.update({LINEAR + "weight_scale_inv": torch.ones(32)}), r"one per row \(64\), got 32"),
        (
            lambda t: t.update({"language_model.model.layers.0.input_layernorm.activation_scale": torch.tensor(1.0)}),
            r"absent or not stored as FP8: .*input_layernorm\.activation_scale",
        ),
        (lambda t: t.update({"model.language_model.norm.weight": torch.ones(3)}), "no layout covers all"),
    ],
)
def test_bad_scales_are_named(stored: Tensors, change: Callable[[Tensors], object], message: str) -> None:
    change(stored)
    with pytest.raises(LayoutError, match=message):
        Mistral3FP8StateDictAdapter.for_vlm_full(vlm_config()).from_hf(stored)


def test_a_bound_adapter_takes_some_tensors_at_a_time(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, layout="identity")
    adapter = load_vlm(tmp_path).state_dict_adapter
    assert adapter.layout is IDENTITY
    assert adapter.from_hf({"lm_head.weight": torch.ones(2, 2)}).keys() == {"lm_head.weight"}
    with pytest.raises(LayoutError, match="fit the layouts"):
        Mistral3FP8StateDictAdapter.for_vlm_full(vlm_config()).from_hf({"lm_head.weight": torch.ones(2, 2)})
    assert Mistral3FP8StateDictAdapter.for_causal_lm().layout is TEXT_ONLY

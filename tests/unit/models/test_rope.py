"""Rotary buffers come back from any state, and nothing else of the module changes."""

from __future__ import annotations

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from ostro.models.rope import is_rotary, rebuild_all_rotary, rebuild_rotary
from tests.helpers.tiny import vlm_config


@pytest.fixture
def model() -> Mistral3ForConditionalGeneration:
    return Mistral3ForConditionalGeneration(vlm_config())


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_garbage_is_replaced(model: Mistral3ForConditionalGeneration) -> None:
    expected = buffers(model)
    places = [buffer.data_ptr() for buffer in model.buffers()]
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    assert rebuild_all_rotary(model) == 2
    assert len(expected) == 4
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name])
    assert [buffer.data_ptr() for buffer in model.buffers()] == places


def test_after_a_build_on_the_meta_device(model: Mistral3ForConditionalGeneration) -> None:
    with torch.device("meta"):
        empty = Mistral3ForConditionalGeneration(vlm_config())
    empty.to_empty(device="cpu")
    rebuild_all_rotary(empty)
    for name, buffer in buffers(model).items():
        assert torch.equal(empty.get_buffer(name), buffer)


def test_a_cast_model_has_float32_frequencies_again(model: Mistral3ForConditionalGeneration) -> None:
    expected = buffers(model)
    model.to(torch.bfloat16)
    assert rebuild_all_rotary(model) == 2
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name])
    assert "model.language_model.rotary_emb.inv_freq" not in model.state_dict(), "still in no file"


def test_hooks_and_module_stay(model: Mistral3ForConditionalGeneration) -> None:
    rotary = model.model.language_model.rotary_emb
    calls = []
    rotary.register_forward_pre_hook(lambda module, args: calls.append(module))
    rebuild_rotary(rotary)
    assert model.model.language_model.rotary_emb is rotary
    rotary(torch.zeros(1, 3, 8), torch.arange(3)[None])
    assert calls == [rotary]


def test_only_rotary_modules_are_touched(model: Mistral3ForConditionalGeneration) -> None:
    assert {type(module).__name__ for module in model.modules() if is_rotary(module)} == {
        "Ministral3RotaryEmbedding",
        "PixtralVisionRotaryEmbedding",
    }


def test_no_storage_is_an_error() -> None:
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(vlm_config())
    with pytest.raises(ValueError, match="has no storage"):
        rebuild_all_rotary(model)


def test_a_config_with_senseless_frequencies_is_an_error(model: Mistral3ForConditionalGeneration) -> None:
    rotary = model.model.language_model.rotary_emb
    rotary.config.rope_parameters["factor"] = float("nan")
    with pytest.raises(ValueError, match=r"inv_freq: not finite; check rope_parameters"):
        rebuild_rotary(rotary)

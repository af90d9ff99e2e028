"""The VLM class around transformers' model: config, outputs, rotary hooks, folders, packed calls."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config, Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration, ModelClass, _rotary_reinit_self_hook
from ostro.models.packed import PACKED_MASK, packed_offsets, use_packed_attention
from ostro.models.registry import ModelRegistry
from ostro.models.rope import is_rotary
from ostro.parallel.apply import checkpoint_activations
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.tiny import text_config, vlm_config

FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
IMAGE_TOKEN = 10


def fp8_config(quantization: Any = FP8) -> Mistral3Config:
    config = vlm_config()
    config.quantization_config = quantization
    return config


def model(config: Mistral3Config | None = None) -> Mistral3FP8VLMForConditionalGeneration:
    torch.manual_seed(0)
    return Mistral3FP8VLMForConditionalGeneration(config or fp8_config()).eval()


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of 24 tokens, one image of 4 tokens in each."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(14, 96, (2, 24), generator=generator)
    input_ids[:, 5:9] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    return {"input_ids": input_ids, "pixel_values": pixels, "image_sizes": torch.tensor([[56, 56], [56, 56]])}


def test_config_given_is_left_as_it_was() -> None:
    config = fp8_config()
    before = json.dumps(config.to_dict(), default=str)
    attention = config.vision_config._attn_implementation
    built = model(config)
    assert json.dumps(config.to_dict(), default=str) == before
    assert config.vision_config._attn_implementation == attention
    assert "quantization_config" not in built.config.to_dict()
    assert built.config.text_config is not config.text_config


def test_no_linear_is_swapped_and_names_are_stock() -> None:
    built, stock = model(), Mistral3ForConditionalGeneration(vlm_config())
    assert list(built.state_dict()) == list(stock.state_dict())
    kinds = {name: type(module) for name, module in built.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(kinds.values()) == {torch.nn.Linear}
    assert built.lm_head.weight is built.model.language_model.embed_tokens.weight


def test_registry_knows_the_class() -> None:
    assert ModelClass is Mistral3FP8VLMForConditionalGeneration
    assert ModelRegistry.model_arch_name_to_cls[ModelClass.__name__] is ModelClass


def test_supports_fp8_configs_of_the_family_only() -> None:
    supports = Mistral3FP8VLMForConditionalGeneration.supports_config
    small = Mistral3Config(text_config=MistralConfig().to_dict())
    small.quantization_config = FP8
    text = text_config()
    text.quantization_config = FP8
    assert supports(fp8_config())
    assert supports(fp8_config(FineGrainedFP8Config()))
    assert not supports(vlm_config())
    assert not supports(fp8_config({"quant_method": "bitsandbytes"}))
    assert not supports(fp8_config(None))
    assert not supports(small)
    assert not supports(text)


def test_final_hidden_states_on_request_only() -> None:
    built = model()
    kept: list[Any] = []
    built.model.register_forward_hook(lambda module, args, output: kept.append(output.hidden_states))
    stock = Mistral3ForConditionalGeneration(vlm_config())
    stock.load_state_dict(built.state_dict())
    expected = stock.eval()(**inputs(), output_hidden_states=True).hidden_states[-1]
    assert built(**inputs()).hidden_states is None
    got = built(**inputs(), output_hidden_states=True, logits_to_keep=1)
    assert got.logits.shape == (2, 1, 96)
    torch.testing.assert_close(got.hidden_states, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(built.lm_head(got.hidden_states[:, -1:]), got.logits, atol=1e-5, rtol=0)
    built.config.text_config.output_hidden_states = True
    assert built(**inputs()).hidden_states.shape == (2, 24, 32)
    assert built(**inputs(), output_hidden_states=False).hidden_states is None
    assert kept == [None] * 4  # the inner model never keeps the states of its layers


@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([3, 20])])
def test_logits_of_kept_positions(keep: int | torch.Tensor) -> None:
    built = model()
    every = built(**inputs()).logits
    expected = every[:, keep] if isinstance(keep, torch.Tensor) else every[:, -keep:]
    torch.testing.assert_close(built(**inputs(), logits_to_keep=keep).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [1, torch.tensor([3])])
def test_labels_need_all_logits(keep: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits_to_keep: must be 0 where labels are given"):
        model()(**inputs(), labels=inputs()["input_ids"], logits_to_keep=keep)


def test_logits_to_keep_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits_to_keep: .* got shape \(1, 1\)"):
        model()(**inputs(), logits_to_keep=torch.tensor([[1]]))


def test_tuple_attentions_and_cache_as_stock() -> None:
    built = model()
    stock = Mistral3ForConditionalGeneration(vlm_config()).eval()
    stock.load_state_dict(built.state_dict())
    asked: dict[str, Any] = {"labels": inputs()["input_ids"], "use_cache": False, "return_dict": False}
    for ours, reference in zip(built(**inputs(), **asked), stock(**inputs(), **asked), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)
    for each in (built, stock):
        each.set_attn_implementation("eager")
    got, expected = (each(**inputs(), output_attentions=True) for each in (built, stock))
    torch.testing.assert_close(got.attentions, expected.attentions, atol=1e-5, rtol=0)
    assert got.past_key_values.get_seq_length() == 24
    assert got.image_hidden_states.shape == (8, 32)


@pytest.mark.parametrize("packed_attention", [False, True])
def test_generates_what_stock_generates(packed_attention: bool) -> None:
    built = model()
    stock = Mistral3ForConditionalGeneration(vlm_config()).eval()
    stock.load_state_dict(built.state_dict())
    if packed_attention:
        use_packed_attention(built)
    padded = inputs()
    padded["attention_mask"] = torch.ones(2, 24, dtype=torch.int64)
    padded["attention_mask"][1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(built.generate(**padded, **options), stock.generate(**padded, **options))


def test_hook_restores_buffers_of_a_model_built_without_storage() -> None:
    reference = model()
    with torch.device("meta"):
        built = Mistral3FP8VLMForConditionalGeneration(fp8_config()).eval()
    built.to_empty(device="cpu")
    built.load_state_dict(reference.state_dict())
    built.tie_weights()
    rotary = [module for module in built.modules() if is_rotary(module)]
    assert len(rotary) == 2
    for module in rotary:
        for buffer in module.buffers():
            buffer.fill_(torch.nan)
    torch.testing.assert_close(built(**inputs()).logits, reference(**inputs()).logits, atol=0, rtol=0)


def test_hook_removes_only_itself() -> None:
    built = model()
    rotary = built.model.language_model.rotary_emb
    calls: list[str] = []
    first = rotary.register_forward_pre_hook(lambda module, args: calls.append("plain"))
    rotary.register_forward_pre_hook(lambda module, args, kwargs: calls.append("kwargs"), with_kwargs=True)
    for _ in range(2):
        built(**inputs())
    assert calls == ["plain", "kwargs"] * 2
    assert _rotary_reinit_self_hook not in rotary._forward_pre_hooks.values()
    assert len(rotary._forward_pre_hooks) == 2
    first.remove()
    assert len(rotary._forward_pre_hooks) == 1


def test_hook_waits_for_storage() -> None:
    with torch.device("meta"):
        built = Mistral3FP8VLMForConditionalGeneration(fp8_config())
        built.model.language_model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert _rotary_reinit_self_hook in built.model.language_model.rotary_emb._forward_pre_hooks.values()


@pytest.mark.parametrize("layout", ["nested", "identity"])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_folders_load(tmp_path: Path, tied: bool, layout: str) -> None:
    write_fp8_folder(tmp_path / "fp8", tie_word_embeddings=tied, layout=layout)
    stock = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "bf16", save_original_format=False)
    loaded, info = Mistral3FP8VLMForConditionalGeneration.from_pretrained(
        tmp_path / "bf16", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not (info["missing_keys"] | info["unexpected_keys"])
    torch.testing.assert_close(dict(loaded.state_dict()), dict(stock.state_dict()), atol=0, rtol=0)
    with torch.no_grad():
        given = inputs()
        # bfloat16: sums in another order round to other values; logits are of order 1
        torch.testing.assert_close(loaded(**given).logits, stock(**given).logits, atol=0.1, rtol=0)


@pytest.mark.parametrize("layout", ["nested", "identity"])
def test_saved_folders_open_in_stock_transformers(tmp_path: Path, layout: str) -> None:
    write_fp8_folder(tmp_path / "fp8", layout=layout)
    built = Mistral3FP8VLMForConditionalGeneration.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    built.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}
    for model_class in (Mistral3ForConditionalGeneration, Mistral3FP8VLMForConditionalGeneration):
        loaded, info = model_class.from_pretrained(tmp_path / "saved", output_loading_info=True, dtype=torch.bfloat16)
        assert not (info["missing_keys"] | info["unexpected_keys"])
        torch.testing.assert_close(dict(loaded.state_dict()), dict(built.state_dict()), atol=0, rtol=0)


def test_images_that_do_not_fit_the_text_are_refused() -> None:
    given = inputs()
    given["input_ids"][0, 5] = 20
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model()(**given)


def test_packed_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        built = model().train()
        use_packed_attention(built)
        if checkpointing:
            checkpoint_activations(built)
        row = {**inputs(), "input_ids": inputs()["input_ids"].reshape(1, -1)}
        packed = {"packed_lengths": (24, 24), "packed_offsets": packed_offsets((24, 24))}
        built(**row, **packed, labels=row["input_ids"]).loss.backward()
        gradients.append({name: weight.grad for name, weight in built.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_a_copy_keeps_its_hooks_to_itself() -> None:
    built = model()
    copied = copy.deepcopy(built)
    built(**inputs())
    assert _rotary_reinit_self_hook not in built.model.language_model.rotary_emb._forward_pre_hooks.values()
    assert _rotary_reinit_self_hook in copied.model.language_model.rotary_emb._forward_pre_hooks.values()
    assert torch.equal(copied(**inputs()).logits, built(**inputs()).logits)


def test_packed_call_fills_in_mask_and_positions() -> None:
    built = model()
    use_packed_attention(built)
    row = {**inputs(), "input_ids": inputs()["input_ids"].reshape(1, -1)}
    packed = {"packed_lengths": (24, 24), "packed_offsets": packed_offsets((24, 24))}
    positions = torch.arange(24).repeat(2)[None]
    expected = built(**row, **packed, attention_mask=PACKED_MASK, position_ids=positions, use_cache=False)
    got = built(**row, **packed)
    assert torch.equal(got.logits, expected.logits)
    assert got.past_key_values is None


def test_packed_call_without_packed_attention_is_refused() -> None:
    built = model()
    row = inputs()["input_ids"].reshape(1, -1)
    with pytest.raises(ValueError, match="packed_lengths: attention function must be 'ostro_packed', got 'sdpa'"):
        built(input_ids=row, packed_lengths=(24, 24), packed_offsets=packed_offsets((24, 24)))


def test_packed_mask_without_lengths_is_refused() -> None:
    built = model()
    use_packed_attention(built)
    with pytest.raises(ValueError, match="packed_lengths, packed_offsets: missing"):
        built(input_ids=inputs()["input_ids"][:1, 10:], attention_mask=PACKED_MASK)

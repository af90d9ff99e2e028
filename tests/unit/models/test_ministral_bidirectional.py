"""The bidirectional tower: its interface, masks, positions, caches, captured outputs, gradients and files."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AttentionInterface, AutoConfig, AutoModel, Ministral3Config, Ministral3Model
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ostro.models import ministral_bidirectional
from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.packed import PackedTexts, forward_packed, use_packed_attention
from tests.helpers.tiny import padded, text_config, token_ids


def config(**overrides: Any) -> Ministral3BidirectionalConfig:
    fields = text_config().to_dict()
    del fields["model_type"], fields["use_cache"]
    return Ministral3BidirectionalConfig(**{**fields, **overrides})


def build(attn_implementation: str = "sdpa", **overrides: Any) -> Ministral3BidirectionalModel:
    torch.manual_seed(0)
    model = Ministral3BidirectionalModel(config(**overrides)).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def hidden(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model(**inputs).last_hidden_state
    return states


def test_the_interface_is_the_specified_one() -> None:
    parameters = inspect.signature(Ministral3BidirectionalModel.forward).parameters
    assert list(parameters) == [
        "self",
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "use_cache",
        "cache_position",
        "kwargs",
    ]
    assert all(parameters[name].default is None for name in list(parameters)[1:-1])
    assert ministral_bidirectional.__all__ == [
        "Ministral3BidirectionalModel",
        "Ministral3BidirectionalConfig",
        "ModelClass",
    ]
    assert ministral_bidirectional.ModelClass == [Ministral3BidirectionalModel]
    assert ministral_bidirectional.logger.name == "ostro.models.ministral_bidirectional"
    assert issubclass(Ministral3BidirectionalModel, Ministral3Model)
    assert issubclass(Ministral3BidirectionalConfig, Ministral3Config)
    defaults = Ministral3BidirectionalConfig()
    assert (defaults.model_type, defaults.pooling, defaults.temperature) == ("ministral3_bidirec", "avg", 1.0)
    assert (defaults.is_causal, defaults.use_cache) == (False, False)


def test_registration_is_idempotent() -> None:
    ministral_bidirectional._register_with_hf_auto_classes()
    ministral_bidirectional._register_with_hf_auto_classes()
    assert isinstance(AutoConfig.for_model("ministral3_bidirec"), Ministral3BidirectionalConfig)
    assert isinstance(AutoModel.from_config(config()), Ministral3BidirectionalModel)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_every_token_sees_every_other_and_no_padding(attention: str, side: str) -> None:
    model = build(attention)
    input_ids, mask = padded(token_ids([6]), side=side)
    if side != "none":
        pad = (0, 3) if side == "right" else (3, 0)
        input_ids, mask = torch.nn.functional.pad(input_ids, pad, value=11), torch.nn.functional.pad(mask, pad)
    real = mask[0].bool()
    before = hidden(model, input_ids=input_ids, attention_mask=mask)[0, real]
    for position in range(input_ids.shape[1]):
        changed = input_ids.clone()
        changed[0, position] += 1
        after = hidden(model, input_ids=changed, attention_mask=mask)[0, real]
        if real[position]:
            assert (before - after).abs().amax(1).min() > 1e-3, position
        else:
            assert torch.equal(before, after), position


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_and_right_padding_agree_beyond_the_original_length(attention: str) -> None:
    """The tiny config's query scale changes every 16 positions, as the released ones' does every 16,384."""
    model = build(attention)
    ids = token_ids([5, 70, 200])
    right_ids, right_mask = padded(ids, side="right")
    left_ids, left_mask = padded(ids, side="left")
    right = hidden(model, input_ids=right_ids, attention_mask=right_mask)[right_mask.bool()]
    left = hidden(model, input_ids=left_ids, attention_mask=left_mask)[left_mask.bool()]
    # float32, sums over 200 keys in another order: a few 1e-6 of values up to about 3
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    counted = torch.arange(left_ids.shape[1])[None].expand_as(left_ids)
    shifted = hidden(model, input_ids=left_ids, attention_mask=left_mask, position_ids=counted)[left_mask.bool()]
    assert (shifted - right).abs().max() > 1e-2, "positions that count padding must differ, or the test shows nothing"


@pytest.mark.slow
def test_left_padding_of_more_than_16384_tokens_changes_nothing() -> None:
    rope = {**text_config().rope_parameters, "original_max_position_embeddings": 16384, "factor": 2.0}
    model = build(rope_parameters=rope | {"max_position_embeddings": 32768}, max_position_embeddings=32768)
    ids = torch.tensor(token_ids([16]))
    left = torch.nn.functional.pad(ids, (16400, 0), value=11)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (16400, 0))
    torch.testing.assert_close(
        hidden(model, input_ids=left, attention_mask=mask)[:, -16:], hidden(model, input_ids=ids), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_sliding_window_is_symmetric_and_inclusive(attention: str) -> None:
    model = build(attention, sliding_window=2, num_hidden_layers=1)
    input_ids = torch.tensor(token_ids([9]))
    before = hidden(model, input_ids=input_ids)[0]
    changed = input_ids.clone()
    changed[0, 4] += 1
    moved = (hidden(model, input_ids=changed)[0] - before).abs().amax(1) > 1e-6
    assert moved.tolist() == [abs(position - 4) <= 2 for position in range(9)]


def test_a_4d_mask_is_used_as_it_is() -> None:
    model = build()
    first, second = (torch.tensor([ids]) for ids in token_ids([4, 6]))
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(6, 6)).bool()[None, None]
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    both = hidden(model, input_ids=torch.cat([first, second], 1), attention_mask=blocks, position_ids=positions)
    expected = torch.cat([hidden(model, input_ids=first), hidden(model, input_ids=second)], 1)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_texts_match_the_padded_ones(window: int | None) -> None:
    ids = token_ids([3, 20, 20, 7])
    input_ids, mask = padded(ids, side="left")
    expected = hidden(build(sliding_window=window), input_ids=input_ids, attention_mask=mask)[mask.bool()]
    model = build(sliding_window=window)
    use_packed_attention(model)
    with torch.no_grad():
        packed = forward_packed(model, PackedTexts.from_token_ids(ids))
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_packed_calls_make_no_mask() -> None:
    """A mask over all T tokens of a packed batch would cost T^2 memory, window or not."""
    masks: list[torch.Tensor | None] = []

    def recording(module: torch.nn.Module, query: torch.Tensor, *states: Any, **kwargs: Any) -> tuple[Any, None]:
        masks.append(states[2])
        return query.transpose(1, 2), None

    AttentionInterface.register("ostro_test_recording", recording)
    AttentionMaskInterface.register("ostro_test_recording", sdpa_mask)
    model = build("ostro_test_recording", sliding_window=2)
    ids = torch.tensor(token_ids([9]))
    hidden(model, input_ids=ids, packed_lengths=(4, 5))
    hidden(model, input_ids=ids)
    assert [mask is None for mask in masks] == [True, True, False, False]


def test_a_layer_called_by_itself_is_bidirectional() -> None:
    model = build(num_hidden_layers=1)
    ids = torch.tensor(token_ids([6]))
    positions = torch.arange(6)[None]
    embeds = model.embed_tokens(ids)
    states = model.layers[0](embeds, position_ids=positions, position_embeddings=model.rotary_emb(embeds, positions))
    torch.testing.assert_close(model.norm(states), hidden(model, input_ids=ids))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_cached_piece_sees_earlier_pieces_and_itself(window: int | None, side: str) -> None:
    """Equal to one call whose mask hides the second piece from the first."""
    model = build(sliding_window=window)
    first, first_mask = padded(token_ids([10, 6]), side=side)
    second, second_mask = padded(token_ids([5, 5], seed=1))
    mask = torch.cat([first_mask, second_mask], 1)
    with torch.no_grad():
        cache = model(input_ids=first, attention_mask=first_mask, use_cache=True).past_key_values
    piece = hidden(model, input_ids=second, attention_mask=mask, past_key_values=cache)
    near = (torch.arange(15)[:, None] - torch.arange(15)).abs() <= (window or 15)
    hides = torch.ones(15, 15, dtype=torch.bool)
    hides[:10, 10:] = False
    whole = hidden(
        model,
        input_ids=torch.cat([first, second], 1),
        attention_mask=(near & hides)[None, None] & mask[:, None, None, :].bool(),
        position_ids=(mask.cumsum(1) - 1).clamp(0),
    )
    torch.testing.assert_close(piece, whole[:, 10:], atol=1e-5, rtol=1e-5)


def test_cache_position_says_where_the_tokens_are() -> None:
    model = build()
    ids = torch.tensor(token_ids([40]))
    at_20 = torch.arange(20, 60)
    expected = hidden(model, input_ids=ids, position_ids=at_20[None])
    assert torch.equal(hidden(model, input_ids=ids, cache_position=at_20), expected)
    assert not torch.equal(hidden(model, input_ids=ids), expected)


def test_a_cache_comes_back_only_when_asked_for() -> None:
    model, ids = build(), torch.tensor(token_ids([4]))
    assert model(input_ids=ids).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 4
    model.config.use_cache = True
    assert model(input_ids=ids).past_key_values.get_seq_length() == 4


def test_hidden_states_and_attentions_are_captured() -> None:
    model = build("eager")
    input_ids, mask = padded(token_ids([3, 6]))
    output = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.embed_tokens(input_ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    attention = output.attentions[0]
    assert attention.shape == (2, 4, 6, 6)
    assert not attention[0, :, :, 3:].any()
    assert (attention[1] > 0).all()
    assert isinstance(model(input_ids=input_ids, return_dict=False), tuple)


def test_inputs_embeds_stand_in_for_input_ids() -> None:
    model, ids = build(), torch.tensor(token_ids([5]))
    assert torch.equal(hidden(model, inputs_embeds=model.embed_tokens(ids)), hidden(model, input_ids=ids))


# transformers 5.23 prefers another name, which 5.17 does not know
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_activation_checkpointing_gives_equal_gradients() -> None:
    input_ids, mask = padded(token_ids([3, 9]))
    gradients = []
    for checkpointing in (False, True):
        model = build(use_cache=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=0)


def test_it_compiles_to_one_graph() -> None:
    model = build()
    input_ids, mask = padded(token_ids([3, 9]), side="left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = hidden(model, input_ids=input_ids, attention_mask=mask)
    torch.testing.assert_close(hidden(compiled, input_ids=input_ids, attention_mask=mask), expected)


@pytest.mark.parametrize("loader", [Ministral3BidirectionalModel, AutoModel], ids=["class", "AutoModel"])
def test_saved_and_reloaded_it_is_the_same(tmp_path: Path, loader: Any) -> None:
    model = build(pooling="weighted_avg", temperature=0.02)
    model.save_pretrained(tmp_path)
    reloaded = loader.from_pretrained(tmp_path)
    assert type(reloaded) is Ministral3BidirectionalModel
    assert (reloaded.config.pooling, reloaded.config.temperature) == ("weighted_avg", 0.02)
    ids = torch.tensor(token_ids([30]))
    assert torch.equal(hidden(reloaded, input_ids=ids), hidden(model, input_ids=ids))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["is_causal"]) == ("ministral3_bidirec", False)


def test_a_fresh_process_reloads_it(tmp_path: Path) -> None:
    model, ids = build(), token_ids([30])
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, ostro.models.ministral_bidirectional\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.tensor(eval(sys.argv[2]))).last_hidden_state.detach(), sys.argv[3])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, str(ids), tmp_path / "out.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), hidden(model, input_ids=torch.tensor(ids)))


def test_a_text_only_checkpoint_loads_directly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Ministral3Model(text_config()).save_pretrained(tmp_path)
    model = Ministral3BidirectionalModel.from_pretrained(tmp_path)
    ids = torch.tensor(token_ids([8]))
    changed = ids.clone()
    changed[0, -1] += 1
    assert not torch.equal(hidden(model, input_ids=ids)[0, 0], hidden(model, input_ids=changed)[0, 0])


def test_exactly_one_of_ids_and_embeds_is_needed() -> None:
    model, ids = build(), torch.tensor(token_ids([4]))
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
            model(**inputs)


def test_it_is_never_causal(tmp_path: Path) -> None:
    with pytest.raises(StrictDataclassError, match="is_causal: must be False"):
        Ministral3BidirectionalConfig(is_causal=True)
    model = build()
    with pytest.raises(ValueError, match="is_causal: must be False"):
        model(input_ids=torch.tensor(token_ids([4])), is_causal=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_causal: must be False"):
        AutoModel.from_pretrained(tmp_path, is_causal=True)
    assert Ministral3BidirectionalModel(text_config()).config.is_causal is False


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("temperature", "low"), ("pooling", 3), ("is_causal", 0)]
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(StrictDataclassError, match=field):
        Ministral3BidirectionalConfig(**{field: value})

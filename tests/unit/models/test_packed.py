"""Packed texts give what padded texts give: states, gradients, windows, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Ministral3Model, MistralConfig, MistralModel, PreTrainedModel

from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import (
    PACKED_ATTENTION,
    PackedTexts,
    even_micro_batches,
    forward_packed,
    micro_batches,
    use_packed_attention,
)
from tests.helpers.tiny import padded, text_config, token_ids, vlm_config

LENGTHS = [40, 12, 12, 7, 3, 3, 3, 1]


def tower(**overrides: Any) -> Ministral3BidirectionalModel:
    torch.manual_seed(0)
    settings = text_config(**overrides).to_dict()
    settings.pop("model_type")
    return Ministral3BidirectionalModel(Ministral3BidirectionalConfig(**settings)).eval()


def causal_tower(**overrides: Any) -> Ministral3Model:
    torch.manual_seed(0)
    return Ministral3Model(text_config(**overrides)).eval()


def padded_states(model: torch.nn.Module, ids: list[list[int]], side: str = "right") -> torch.Tensor:
    input_ids, mask = padded(ids, side=side)
    return model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("window", [None, 2, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1], [3, 40, 3]])
def test_states_equal_padded(lengths: list[int], window: int | None) -> None:
    model = tower(sliding_window=window)
    ids = token_ids(lengths)
    expected = padded_states(model, ids)
    use_packed_attention(model)
    states = forward_packed(model, PackedTexts.from_token_ids(ids))
    # float32 rounding of sums taken in another order; hidden states are of order 1
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 3, 39, 40, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1], [3, 40, 3]])
def test_causal_states_equal_padded(lengths: list[int], window: int | None) -> None:
    model = causal_tower(sliding_window=window)
    ids = token_ids(lengths)
    expected = padded_states(model, ids)
    use_packed_attention(model)
    states = forward_packed(model, PackedTexts.from_token_ids(ids))
    # float32 rounding of sums taken in another order; hidden states are of order 1
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_the_call_decides_on_causality_before_the_layer() -> None:
    model, ids = causal_tower(), token_ids(LENGTHS)
    model.config.is_causal = False  # transformers makes a keyword of it, and leaves the layers' flag
    expected = padded_states(model, ids)
    use_packed_attention(model)
    states = forward_packed(model, PackedTexts.from_token_ids(ids))
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_generation_is_as_before_with_packed_attention_on() -> None:
    torch.manual_seed(0)
    model = Mistral3FP8VLMForConditionalGeneration(vlm_config()).eval()
    input_ids, mask = padded(token_ids([9, 4, 20]), side="left")
    inputs = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs)
    use_packed_attention(model)
    assert torch.equal(model.generate(**inputs), expected)


def test_one_call_sets_text_and_vision() -> None:
    model = Mistral3FP8VLMForConditionalGeneration(vlm_config())
    assert model.model.vision_tower.config._attn_implementation == PACKED_ATTENTION
    assert model.model.language_model.config._attn_implementation == "sdpa"
    use_packed_attention(model)
    assert model.model.language_model.config._attn_implementation == PACKED_ATTENTION
    assert model.model.vision_tower.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("make", [tower, causal_tower])
def test_gradients_equal_padded(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    ids = token_ids(LENGTHS)
    target = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(3))

    def gradients(states: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (states * target).sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    expected = gradients(padded_states(model, ids))
    use_packed_attention(model)
    got = gradients(forward_packed(model, PackedTexts.from_token_ids(ids)))
    assert len(got) == len(expected) == len(list(model.parameters()))
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4 * reference.abs().max().item(), rtol=0)


def test_texts_do_not_see_each_other() -> None:
    model = tower()
    use_packed_attention(model)
    first, second = token_ids([6, 6])
    changed = [*second[:-1], second[-1] - 1]
    one = forward_packed(model, PackedTexts.from_token_ids([first, second]))
    other = forward_packed(model, PackedTexts.from_token_ids([first, changed]))
    assert torch.equal(one[:6], other[:6])
    assert not torch.allclose(one[6], other[6])  # while within a text, the first token sees the last


def test_padded_calls_still_work_after_packing_is_on() -> None:
    model = tower()
    ids = token_ids(LENGTHS)
    expected = padded_states(model, ids, side="left")
    use_packed_attention(model)
    torch.testing.assert_close(padded_states(model, ids, side="left"), expected)


@pytest.mark.parametrize("make", [tower, causal_tower])
def test_bf16_is_no_further_from_float32_than_the_padded_form(make: Callable[[], Any]) -> None:
    ids = token_ids([400, 400, 50, 7], seed=5)
    truth_model = make()
    truth = padded_states(truth_model, ids)
    model = make().bfloat16()
    model.rotary_emb = truth_model.rotary_emb
    padded_error = (padded_states(model, ids).float() - truth).norm()
    use_packed_attention(model)
    packed_error = (forward_packed(model, PackedTexts.from_token_ids(ids)).float() - truth).norm()
    # both round at other places; a tenth more is within the spread of that noise
    assert packed_error <= 1.1 * padded_error


def test_bf16_gradients_are_no_further_from_float32_than_the_padded_form() -> None:
    ids = token_ids([70, 70, 50, 7], seed=5)
    target = torch.randn(197, 32, generator=torch.Generator().manual_seed(3))

    def gradient(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (states.float() * target).sum().backward()
        return torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None])

    truth_model, model = tower(), tower().bfloat16()
    truth = gradient(truth_model, padded_states(truth_model, ids))
    padded_error = (gradient(model, padded_states(model, ids)) - truth).norm()
    use_packed_attention(model)
    packed_error = (gradient(model, forward_packed(model, PackedTexts.from_token_ids(ids))) - truth).norm()
    # as above
    assert packed_error <= 1.1 * padded_error


def test_float64_stays_float64() -> None:
    model = tower().double()
    ids = token_ids(LENGTHS)
    expected = padded_states(model, ids)
    use_packed_attention(model)
    states = forward_packed(model, PackedTexts.from_token_ids(ids))
    # norms and cosines of the layers are float32 in transformers; attention must add no error of that size
    torch.testing.assert_close(states, expected, atol=1e-9, rtol=0)


def test_stock_mistral_tower_runs_packed() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=None)
    config.is_causal = False
    model = MistralModel(config).eval()
    ids = token_ids(LENGTHS)
    expected = padded_states(model, ids)
    use_packed_attention(model)
    torch.testing.assert_close(forward_packed(model, PackedTexts.from_token_ids(ids)), expected, atol=1e-5, rtol=0)


def test_dropout_reaches_packed_attention() -> None:
    model = tower(attention_dropout=0.5).train()
    use_packed_attention(model)
    packed = PackedTexts.from_token_ids(token_ids([9, 9]))
    torch.manual_seed(1)
    one = forward_packed(model, packed)
    assert not torch.allclose(one, forward_packed(model, packed))
    torch.manual_seed(1)
    assert torch.equal(one, forward_packed(model, packed))


def test_positions_and_offsets() -> None:
    packed = PackedTexts.from_token_ids([[20, 21, 22], [23], [24, 25]])
    assert packed.position_ids().tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens().tolist() == [0, 3, 4, 6]
    assert (packed.num_texts, packed.num_tokens) == (3, 6)


@pytest.mark.parametrize("texts", [[], [[20], []]])
def test_texts_without_tokens_are_refused(texts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        PackedTexts.from_token_ids(texts)


def test_micro_batches_keep_the_budget_and_every_text() -> None:
    lengths = [5, 90, 3, 3, 200, 60, 40]
    groups = micro_batches(lengths, 100)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert groups[0] == [4]  # longer than the budget: alone, and first
    assert all(sum(lengths[index] for index in group) <= 100 for group in groups[1:])
    assert micro_batches([], 100) == []


@pytest.mark.parametrize("num_at_least", [1, 2, 5, 40])
def test_even_micro_batches_differ_by_little(num_at_least: int) -> None:
    lengths = [1 + 7 * number % 40 for number in range(30)]
    groups = even_micro_batches(lengths, 100, num_at_least)
    totals = [sum(lengths[index] for index in group) for group in groups]
    assert sorted(index for group in groups for index in group) == list(range(30))
    assert max(totals) <= 100
    assert len(groups) >= min(num_at_least, 30)
    assert len(groups) <= max(num_at_least, sum(lengths) // 100 + 2)
    if num_at_least < 30:
        assert max(totals) - min(totals) <= 10
    assert even_micro_batches([150, 3], 100, 2) == [[0], [1]]
    assert even_micro_batches([], 100, 2) == []

"""The bidirectional tower against a reference written from the formulas, and against transformers' own tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Ministral3Model

from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from tests.helpers.tiny import padded, text_config, token_ids

LENGTHS = [3, 40, 17]


def models(
    dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[Ministral3BidirectionalModel, Ministral3Model]:
    """Ours and the stock tower, told by its config to see both ways, with the same weights."""
    config = text_config(**overrides)
    torch.manual_seed(0)
    stock = Ministral3Model(config)
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    ours = Ministral3BidirectionalModel(Ministral3BidirectionalConfig(**fields | {"use_cache": False}))
    ours.load_state_dict(stock.state_dict())
    stock.config.is_causal = False
    for model in (ours, stock):
        rotary = {name: buffer.clone() for name, buffer in model.rotary_emb.named_buffers()}
        model.eval().to(dtype)
        for name, buffer in rotary.items():
            setattr(model.rotary_emb, name, buffer)
    return ours, stock


def reference(model: Ministral3Model, ids: list[int]) -> torch.Tensor:
    """Last hidden states `[n, H]` of one text in float64: every token attends to all n, or to those in its window."""
    config, weights = model.config, {name: weight.detach().double() for name, weight in model.state_dict().items()}
    rope, length, size = config.rope_parameters, len(ids), config.head_dim

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return weights[f"{name}.weight"] * states * scale

    positions = torch.arange(length, dtype=torch.float64)
    # the rotary angles are transformers' own; what is checked here is who attends to whom, and with which scale
    angles = torch.outer(positions, model.rotary_emb.inv_freq.double()).repeat(1, 2)

    def rotate(states: torch.Tensor) -> torch.Tensor:
        half = torch.cat([-states[..., size // 2 :], states[..., : size // 2]], -1)
        return (states * angles.cos()[:, None] + half * angles.sin()[:, None]) * model.rotary_emb.attention_scaling

    steps = (positions / rope["original_max_position_embeddings"]).floor()
    query_scale = 1 + rope["llama_4_scaling_beta"] * torch.log(1 + steps)
    window = config.sliding_window or length
    seen = (positions[:, None] - positions).abs() <= window
    states = weights["embed_tokens.weight"][ids]
    for layer in (f"layers.{index}" for index in range(config.num_hidden_layers)):
        inputs = norm(states, f"{layer}.input_layernorm")
        query, key, value = (
            (inputs @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size)) for name in "qkv"
        )
        query, key = rotate(query) * query_scale[:, None, None], rotate(key)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
        attention = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", attention, value).flatten(1)
        states = states + mixed @ weights[f"{layer}.self_attn.o_proj.weight"].T
        inputs = norm(states, f"{layer}.post_attention_layernorm")
        gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        states = states + (torch.nn.functional.silu(inputs @ gate) * (inputs @ up)) @ down
    return norm(states, "norm")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_texts_match_the_formulas(attention: str, side: str, window: int | None) -> None:
    ours, _ = models(sliding_window=window)
    ours.set_attn_implementation(attention)
    ids = token_ids(LENGTHS)
    input_ids, mask = padded(ids, side=side)
    with torch.no_grad():
        states = ours(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
    expected = torch.cat([reference(ours, text) for text in ids])
    # float32 arithmetic on values up to about 3
    torch.testing.assert_close(states.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_states_are_those_of_the_stock_tower(attention: str, padding: str, dtype: torch.dtype) -> None:
    ours, stock = models(dtype)
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor(token_ids([40, 40]))}
    positions = None
    if padding != "none":
        input_ids, mask = padded(token_ids(LENGTHS), side=padding)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        positions = (mask.cumsum(-1) - 1).clamp(0)
    outputs = []
    for model, given in ((ours, inputs), (stock, {**inputs, "position_ids": positions})):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            outputs.append(model(**given).last_hidden_state)
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1])


def test_gradients_are_those_of_the_stock_tower() -> None:
    ours, stock = models()
    input_ids, mask = padded(token_ids(LENGTHS))
    gradients = []
    for model in (ours, stock):
        model.train()
        model(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()].pow(3).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)

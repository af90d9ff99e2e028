"""Counted operations against those torch counts while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ostro.data.conversation_collate import ConversationBatch
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import packed_offsets, use_packed_attention
from ostro.train.flops import peak_flops, step_flops
from ostro.train.options import Part
from ostro.train.parts import PARTS, freeze
from tests.helpers.tiny import vlm_config


def batch(config: object, *, with_image: bool) -> ConversationBatch:
    """Two samples of 12 and 7 tokens; the first shows an image of 2 x 2 merged patches, as 4 tokens."""
    ids = torch.arange(20, 39)
    if with_image:
        ids[1:3] = ids[4:6] = 10
    labels = ids.roll(-1)
    return ConversationBatch(
        input_ids=ids,
        labels=labels,
        lengths=(12, 7),
        pixel_values=torch.randn(1, 3, 56, 56) if with_image else None,
        image_sizes=torch.tensor([[56, 56]]) if with_image else None,
        num_supervised=19,
    )


@pytest.mark.parametrize(
    "frozen", [(), ("vision",), ("vision", "projector", "embeddings"), ("language_model",)], ids=str
)
@pytest.mark.parametrize("with_image", [True, False])
def test_products_are_those_that_torch_counts(frozen: tuple[Part, ...], with_image: bool) -> None:
    config = vlm_config(tie_word_embeddings=False)
    model = Mistral3FP8VLMForConditionalGeneration(config)
    use_packed_attention(model)
    freeze(model, frozen)
    made = batch(config, with_image=with_image)
    # the math backend: its products are counted, and the full square of a causal text, of which half is meant
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(
            input_ids=made.input_ids[None],
            pixel_values=made.pixel_values,
            image_sizes=made.image_sizes,
            packed_lengths=made.lengths,
            packed_offsets=packed_offsets(made.lengths),
        ).logits
        logits.float().logsumexp(-1).sum().backward()
    counted = counter.get_total_flops()
    text = config.text_config
    half = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * (12**2 + 7**2)
    before_text = {"vision", "projector", "embeddings"} - set(frozen)
    passes = 3 if before_text or "language_model" not in frozen else 1
    ours = step_flops(model.config, made, set(PARTS) - set(frozen)) + half * passes
    # what torch skips: the gradient of the first layer's input where nothing before it trains
    assert ours == pytest.approx(counted, rel=0.06)
    assert ours >= 0.99 * counted


def test_a_device_that_is_not_known_is_measured() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), torch.bfloat16) < 1e14

"""The vision-language model against transformers' own on the same weights: logits, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import packed_offsets, use_packed_attention
from tests.helpers.tiny import padded, vlm_config

IMAGE_TOKEN = 10
Sample = tuple[list[int], list[tuple[int, int]]]

ONE: Sample = ([20, *[IMAGE_TOKEN] * 6, 21, 22, 30, 31], [(56, 84)])
SEVERAL: Sample = (
    [40, *[IMAGE_TOKEN] * 2, 12, *[IMAGE_TOKEN] * 2, 13, 41, IMAGE_TOKEN, 42, *[IMAGE_TOKEN] * 12, 43, 44],
    [(28, 56), (56, 28), (28, 28), (84, 112)],
)
NONE: Sample = ([50, 51, 52, 53, 54], [])
# longer than original_max_position_embeddings (16), so that the query scale is at work: 1 + 0.1 log(1 + floor(p / 16))
LONG: Sample = ([60 + index % 30 for index in range(40)], [])
BATCHES = {
    "one image": [ONE, ONE],
    "several images": [SEVERAL, ONE],
    "no images": [NONE, LONG],
    "mixed": [ONE, NONE, LONG, SEVERAL, ONE, NONE],
}


def pair(*, tied: bool, **overrides: Any) -> tuple[Mistral3ForConditionalGeneration, Any]:
    """The stock model and ours with equal weights."""
    torch.manual_seed(0)
    stock = Mistral3ForConditionalGeneration(vlm_config(tie_word_embeddings=tied, **overrides))
    ours = Mistral3FP8VLMForConditionalGeneration(vlm_config(tie_word_embeddings=tied, **overrides))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def images(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_sizes` of all samples in turn; the same pixels for the same image of a sample."""
    sizes = [size for _, given in samples for size in given]
    if not sizes:
        return {}
    pixels = torch.zeros(len(sizes), 3, max(size[0] for size in sizes), max(size[1] for size in sizes))
    for index, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(height * 1000 + width)
        pixels[index, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def padded_batch(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Samples padded on the right, with labels."""
    input_ids, mask = padded([ids for ids, _ in samples])
    labels = input_ids.masked_fill((mask == 0) | (input_ids == IMAGE_TOKEN), -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, **images(samples)}


def packed_batch(samples: list[Sample]) -> dict[str, Any]:
    """Samples end to end, with labels."""
    lengths = tuple(len(ids) for ids, _ in samples)
    input_ids = torch.tensor([[token for ids, _ in samples for token in ids]])
    labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN, -100)
    packed = {"packed_lengths": lengths, "packed_offsets": packed_offsets(lengths)}
    return {"input_ids": input_ids, "labels": labels, **packed, **images(samples)}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that has one."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to float32 rounding of sums taken in another order, on the scale of the largest value."""
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def assert_gradients_close(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Every gradient, and no other parameter has one."""
    reference = gradients(expected)
    assert gradients(got).keys() == reference.keys()
    for name, gradient in gradients(got).items():
        assert_close(gradient, reference[name])


@pytest.mark.parametrize("packed_attention", [False, True], ids=["sdpa", "packed attention"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_padded_batch_equals_stock(samples: list[Sample], tied: bool, packed_attention: bool) -> None:
    stock, ours = pair(tied=tied)
    if packed_attention:
        use_packed_attention(ours)
    if samples == BATCHES["several images"]:
        samples = [SEVERAL, *samples]
    batch = padded_batch(samples)
    expected, got = stock(**batch), ours(**batch)
    real = batch["attention_mask"].bool()
    assert_close(got.logits[real], expected.logits[real])
    assert_close(got.loss, expected.loss)
    for output in (expected, got):
        output.loss.backward()
    assert_gradients_close(ours, stock)


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window 5"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_packed_samples_equal_stock_one_by_one(samples: list[Sample], tied: bool, window: int | None) -> None:
    stock, ours = pair(tied=tied, sliding_window=window)
    use_packed_attention(ours)
    expected_logits, total, count = [], torch.tensor(0.0), 0
    for sample in samples:
        batch = padded_batch([sample])
        output = stock(**batch)
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        expected_logits.append(output.logits[0])
        total, count = total + output.loss * supervised, count + supervised
    expected_loss = total / count
    expected_loss.backward()
    got = ours(**packed_batch(samples))
    got.loss.backward()
    assert_close(got.logits[0], torch.cat(expected_logits))
    assert_close(got.loss, expected_loss)
    assert_gradients_close(ours, stock)


def test_query_scale_is_at_work_in_the_long_sample() -> None:
    _, ours = pair(tied=True)
    use_packed_attention(ours)
    batch = packed_batch([NONE, LONG])
    before = ours(**batch).logits
    ours.config.text_config.rope_parameters["llama_4_scaling_beta"] = 0.0
    after = ours(**batch).logits
    start = len(NONE[0])
    assert torch.equal(before[0, : start + 16], after[0, : start + 16])
    assert not torch.allclose(before[0, start + 16 :], after[0, start + 16 :], atol=1e-4)


def test_bfloat16_packed_is_no_further_from_float32_than_stock() -> None:
    truth, _ = pair(tied=True)
    stock, ours = (model.bfloat16() for model in pair(tied=True))
    use_packed_attention(ours)
    for model in (stock, ours):  # a bfloat16 frequency would be the larger error
        model.model.language_model.rotary_emb = truth.model.language_model.rotary_emb
        model.model.vision_tower.patch_positional_embedding = truth.model.vision_tower.patch_positional_embedding
    samples = BATCHES["mixed"]
    with torch.no_grad():
        exact = torch.cat([truth(**padded_batch([sample])).logits[0] for sample in samples])
        expected = torch.cat([stock(**padded_batch([sample])).logits[0] for sample in samples]).float()
        got = ours(**packed_batch(samples)).logits[0].float()
    # both round at other places; a tenth more is within the spread of that noise
    assert (got - exact).norm() <= 1.1 * (expected - exact).norm()

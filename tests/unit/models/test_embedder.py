"""The embedder: packed equals padded for every pooling kind, and vectors have length 1."""

from __future__ import annotations

import pytest
import torch

from ostro.models.embedder import SINGLE_VECTOR_POOLING, Embedder
from ostro.models.packed import PackedTexts, fill_up
from tests.helpers.tiny import padded, token_ids
from tests.unit.models.test_packed import LENGTHS, tower


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", SINGLE_VECTOR_POOLING)
def test_packed_equals_padded(pooling: str, side: str) -> None:
    embedder = Embedder(tower(), pooling=pooling)
    ids = token_ids(LENGTHS)
    packed = embedder(PackedTexts.from_token_ids(ids))
    torch.testing.assert_close(packed, embedder.forward_padded(*padded(ids, side=side)), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.norm(dim=-1), torch.ones(len(ids)))


def test_unnormalised_vectors_keep_their_length() -> None:
    packed = PackedTexts.from_token_ids(token_ids([5, 4]))
    norms = Embedder(tower(), normalize=False)(packed).norm(dim=-1)
    assert (norms - 1).abs().min() > 0.1


def test_vectors_of_a_bf16_model_are_float32() -> None:
    assert Embedder(tower().bfloat16())(PackedTexts.from_token_ids(token_ids([5]))).dtype == torch.float32


def test_many_vectors_per_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling: must be one of avg.*got 'colbert'"):
        Embedder(tower(), pooling="colbert")


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 100, 1003, 2048, 2049])
def test_low_precision_batches_are_filled_up_to_few_sizes(num_tokens: int) -> None:
    packed = PackedTexts.from_token_ids([[20] * num_tokens])
    filled = fill_up(packed)
    missing = filled.num_tokens - num_tokens
    assert sum(filled.lengths) == filled.num_tokens
    assert filled.num_tokens % 8 == 0
    assert missing <= max(7, num_tokens // 16)
    assert filled.lengths == ((num_tokens, missing) if missing else (num_tokens,))


def test_number_of_sizes_is_small() -> None:
    sizes = {fill_up(PackedTexts.from_token_ids([[20] * n])).num_tokens for n in range(1024, 2049)}
    assert len(sizes) == 17


def test_filled_up_tokens_change_neither_vectors_nor_gradients() -> None:
    ids = token_ids([9, 4])  # 13 tokens, filled up to 16 with id 0
    model = Embedder(tower().bfloat16())
    truth = Embedder(tower())
    got, expected = (one(PackedTexts.from_token_ids(ids)) for one in (model, truth))
    padded_error = (model.forward_padded(*padded(ids)) - expected).norm()
    # both round at other places; a quarter more is within the spread of that noise
    assert (got - expected).norm() <= 1.25 * padded_error
    got.sum().backward()
    weight = model.backbone.get_input_embeddings().weight
    assert weight.grad is not None
    assert not weight.grad[0].any()
    assert weight.grad[ids[0][0]].any()

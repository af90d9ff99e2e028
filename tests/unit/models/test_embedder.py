"""The embedder: packed equals padded for every pooling kind, and vectors have length 1."""

from __future__ import annotations

import pytest
import torch

from ostro.models.embedder import SINGLE_VECTOR_POOLING, Embedder
from ostro.models.packed import PackedTexts
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

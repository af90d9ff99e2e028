"""On a CUDA device: variable-length attention gives the padded result, forward and backward, and a run trains there."""

from __future__ import annotations

import pytest
import torch

from ostro.models.embedder import Embedder
from ostro.models.packed import PackedTexts
from tests.helpers.tiny import padded, token_ids
from tests.unit.models.test_packed import LENGTHS, tower

pytestmark = pytest.mark.gpu


def vectors_and_gradient(
    embedder: Embedder, ids: list[list[int]], *, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    embedder.zero_grad()
    if packed:
        vectors = embedder(PackedTexts.from_token_ids(ids))
    else:
        vectors = embedder.forward_padded(*(tensor.cuda() for tensor in padded(ids)))
    target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).cuda()
    (vectors * target).sum().backward()
    gradient = torch.cat([weight.grad.flatten().float() for weight in embedder.parameters() if weight.grad is not None])
    return vectors.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_no_further_from_float32_than_padded(dtype: torch.dtype) -> None:
    ids = token_ids(LENGTHS)
    # float32 without tf32, the torch default
    truth = vectors_and_gradient(Embedder(tower()).cuda(), ids, packed=False)
    embedder = Embedder(tower().to(dtype)).cuda()
    reference = vectors_and_gradient(embedder, ids, packed=False)
    got = vectors_and_gradient(embedder, ids, packed=True)
    for ours, padded_form, exact in zip(got, reference, truth, strict=True):
        # the two round at other places: a quarter more, and float32's own noise
        assert (ours - exact).norm() <= 1.25 * (padded_form - exact).norm() + 1e-5 * exact.norm()

"""The contrastive loss of one process: against the pair-by-pair form, and at its edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from ostro.losses.contrastive import ContrastiveOutput, ContrastiveTargets, LearnedTemperature, contrastive_loss
from ostro.losses.options import ContrastiveOptions
from tests.unit.losses.naive import make_part, naive_loss

OPTIONS = {
    "plain": ContrastiveOptions(),
    "symmetric": ContrastiveOptions(symmetric=True),
    "margin": ContrastiveOptions(symmetric=True, false_negative_margin=0.1),
    "matryoshka": ContrastiveOptions(symmetric=True, matryoshka_dims=(12, 8, 3), matryoshka_weights=(0.5, 1.0, 2.0)),
    "all": ContrastiveOptions(symmetric=True, matryoshka_dims=(6, 2), false_negative_margin=0.2),
}


def distinct_targets(num_queries: int, num_documents: int) -> ContrastiveTargets:
    """Document i answers query i and no other; further documents are negatives."""
    rows = torch.arange(num_documents)
    return ContrastiveTargets(rows[:num_queries], rows, rows[:num_queries, None])


def loss_of(
    query: torch.Tensor, document: torch.Tensor, targets: ContrastiveTargets, **options: object
) -> ContrastiveOutput:
    return contrastive_loss(query, document, targets, temperature=0.05, options=ContrastiveOptions(**options))


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_pair_by_pair_form(name: str) -> None:
    part = make_part(16, 30, seed=3)
    values = []
    for function in (naive_loss, contrastive_loss):
        query, document = part.query.clone().requires_grad_(), part.document.clone().requires_grad_()
        temperature = LearnedTemperature(0.07).double()
        if function is naive_loss:
            loss = naive_loss(query, document, part.targets, temperature(), OPTIONS[name])
        else:
            output = contrastive_loss(query, document, part.targets, temperature=temperature(), options=OPTIONS[name])
            loss = output.loss
            assert output.num_masked > 0
        loss.backward()
        values.append((loss.detach(), query.grad, document.grad, temperature.log_temperature.grad))
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-12)


def test_masks_change_the_loss() -> None:
    part = make_part(16, 30, seed=3)
    losses = {
        name: contrastive_loss(part.query, part.document, part.targets, temperature=0.07, options=options).loss.item()
        for name, options in OPTIONS.items()
    }
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)


def test_is_cross_entropy_when_nothing_is_masked() -> None:
    part = make_part(5, 9, seed=0)
    output = loss_of(part.query, part.document, distinct_targets(5, 9))
    scores = part.query @ part.document.T
    torch.testing.assert_close(output.loss, F.cross_entropy(scores / 0.05, torch.arange(5)))
    torch.testing.assert_close(output.positive_score, scores.diagonal().mean())
    torch.testing.assert_close(output.accuracy, (scores.argmax(1) == torch.arange(5)).float().mean())
    assert output.num_masked == 0


def test_copies_and_known_positives_count_for_nothing() -> None:
    part = make_part(4, 6, seed=1)
    expected = loss_of(part.query, part.document, distinct_targets(4, 6)).loss
    # A copy of query 0's positive, a second copy of negative 5, and a document known to answer all queries.
    document = torch.cat((part.document, part.document[[0, 5, 3]]))
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 5, 99])
    known = torch.tensor([[0, 99], [1, 99], [2, 99], [3, 99]])
    output = loss_of(part.query, document, ContrastiveTargets(torch.arange(4), ids, known))
    torch.testing.assert_close(output.loss, expected)
    assert output.num_masked == 3 * 4


def test_own_positive_needs_no_place_among_the_known() -> None:
    part = make_part(4, 6, seed=1)
    targets = ContrastiveTargets(torch.arange(4), torch.tensor([0, 1, 2, 3, 0, 5]), torch.full((4, 0), -1))
    listed = dataclasses.replace(targets, known_positive_ids=torch.arange(4)[:, None])
    assert loss_of(part.query, part.document, targets).loss == loss_of(part.query, part.document, listed).loss


def test_margin_leaves_out_what_scores_above_the_positive() -> None:
    query = torch.tensor([[1.0, 0.0]])
    document = F.normalize(torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.88, math.sqrt(1 - 0.88**2)]]))
    targets = distinct_targets(1, 3)
    output = loss_of(query, document, targets, false_negative_margin=0.1)
    torch.testing.assert_close(output.loss, loss_of(query, document[[0, 2]], distinct_targets(1, 2)).loss)
    assert output.num_masked == 1
    assert loss_of(query, document, targets, false_negative_margin=0.3).num_masked == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_collapsed_embeddings_score_at_chance(symmetric: bool) -> None:
    one = F.normalize(torch.ones(32, 8))
    output = loss_of(one, one, distinct_targets(32, 32), symmetric=symmetric)
    assert output.loss.item() == pytest.approx(math.log(32), rel=1e-6)
    assert output.accuracy.item() == pytest.approx(1 / 32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_negatives_the_loss_is_zero_and_so_is_its_gradient(symmetric: bool) -> None:
    part = make_part(3, 3, seed=2)
    everything_known = dataclasses.replace(distinct_targets(3, 3), known_positive_ids=torch.arange(3).expand(3, 3))
    for query, document, targets in [
        (part.query[:1], part.document[:1], distinct_targets(1, 1)),
        (part.query, part.document, everything_known),
    ]:
        query = query.clone().requires_grad_()
        output = loss_of(query, document, targets, symmetric=symmetric, matryoshka_dims=(4,))
        output.loss.backward()
        assert output.loss.item() == 0
        assert output.accuracy.item() == 1
        assert query.grad.abs().max() == 0


def test_low_precision_is_no_worse_than_naive() -> None:
    part = make_part(64, 256, seed=4, dim=64)
    targets = distinct_targets(64, 256)
    query, document = part.query.bfloat16(), (part.document + F.pad(part.query, (0, 0, 0, 192))).bfloat16()
    truth = F.cross_entropy(query.float() @ document.float().T / 0.02, torch.arange(64)).item()
    naive = F.cross_entropy(query @ document.T / 0.02, torch.arange(64)).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = contrastive_loss(query, document, targets, temperature=0.02, options=ContrastiveOptions()).loss
    assert ours.dtype == torch.float32
    assert abs(naive - truth) > 1e-3 * truth
    # float32 against float32: only the order of a sum over 64 products differs.
    assert abs(ours.item() - truth) < 1e-5 * truth


def test_learned_temperature_stays_positive() -> None:
    temperature = LearnedTemperature(0.02)
    assert temperature().item() == pytest.approx(0.02)
    (10 * temperature()).backward()
    torch.optim.SGD(temperature.parameters(), lr=100.0).step()
    assert temperature().item() > 0


def test_shapes_that_disagree_are_named() -> None:
    part, targets = make_part(4, 6, seed=1), distinct_targets(4, 6)
    with pytest.raises(ValueError, match=r"targets\.positives: must have one row per embedding, 3, got 4"):
        loss_of(part.query[:3], part.document, targets)
    with pytest.raises(ValueError, match=r"targets\.document_ids: must have one row per embedding, 5, got 6"):
        loss_of(part.query, part.document[:5], targets)
    with pytest.raises(ValueError, match="document_ND: must have the embedding size of the queries, 12, got 11"):
        loss_of(part.query, part.document[:, :11], targets)
    with pytest.raises(ValueError, match=r"loss\.matryoshka_dims: must be <= the embedding size 12, got \[16, 8\]"):
        loss_of(part.query, part.document, targets, matryoshka_dims=(16, 8))

"""Exact search against a whole sorted score matrix, and what happens to equal scores."""

from __future__ import annotations

import resource

import pytest
import torch

from ostro.errors import OstroError
from ostro.retrieval.search import Ranking, top_k


def random_embeddings(num_rows: int, num_dims: int = 32, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_dims, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 10, 300])
def test_is_the_top_k_of_the_whole_score_matrix(k: int) -> None:
    queries, documents = random_embeddings(600), random_embeddings(9000, seed=1)
    found = top_k(queries, documents.split(1000), k)
    exact = queries.double() @ documents.double().T
    # float32 sums of 32 products of size 1; where two documents are nearer than that, either may come first
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(exact.gather(1, found.indices), exact.topk(k).values, **close)
    torch.testing.assert_close(found.scores.double(), exact.topk(k).values, **close)
    assert all(len(row.unique()) == k for row in found.indices)
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 7, 4096, 5000])
def test_the_cutting_into_blocks_changes_nothing_ties_included(size: int) -> None:
    queries = random_embeddings(20, 4)
    documents = random_embeddings(50, 4, seed=1).repeat(100, 1)  # every score 100 times
    whole, cut = top_k(queries, [documents], 150), top_k(queries, documents.split(size), 150)
    assert torch.equal(whole.scores, cut.scores)
    assert torch.equal(whole.indices, cut.indices)
    assert torch.equal(whole.scores, (queries @ documents.T).topk(150).values)


def test_memory_does_not_grow_with_the_corpus() -> None:
    num_blocks, block_mib = 40, 16
    blocks = (torch.full((4096, 1024), float(number)) for number in range(num_blocks))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = top_k(torch.ones(8, 1024), blocks, 3)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.indices.min() >= (num_blocks - 1) * 4096
    assert grown_mib < num_blocks * block_mib / 4


@pytest.mark.parametrize(("num_queries", "num_documents", "num_dims"), [(3, 7, 384), (100, 691, 192), (700, 4097, 3)])
def test_equal_vectors_have_equal_scores_at_every_position(num_queries: int, num_documents: int, num_dims: int) -> None:
    vector = torch.nn.functional.normalize(random_embeddings(1, num_dims))
    found = top_k(vector.expand(num_queries, -1), [vector.expand(num_documents, -1)], num_documents)
    assert len(found.scores.unique()) == 1
    assert torch.equal(found.indices.sort().values, torch.arange(num_documents).expand(num_queries, -1))


def test_a_collapsed_model_finds_what_chance_finds() -> None:
    num_queries, num_documents, k = 2000, 500, 10
    found = top_k(torch.ones(num_queries, 8), [torch.ones(num_documents, 8)], k)
    # Each document is found by Q k / N = 40 queries on average, with the variance of a binomial, 39.2.
    counts = found.indices.flatten().bincount(minlength=num_documents).float()
    assert counts.mean() == 40
    assert 0.8 < counts.var() / 39.2 < 1.2
    assert counts.max() < 40 + 5 * 39.2**0.5
    # Mean rank of the first ten documents of the corpus: (N + 1) / 2 with a standard error of 1.
    everything = top_k(torch.ones(num_queries, 8), [torch.ones(num_documents, 8)], num_documents).indices
    assert abs((everything < 10).nonzero()[:, 1].float().mean() + 1 - 250.5) < 5


def test_ties_follow_the_seed_and_the_query() -> None:
    def order(seed: int) -> torch.Tensor:
        return top_k(torch.ones(2, 1), [torch.ones(100, 1)], 100, seed=seed).indices

    first, again, other = order(0), order(0), order(1)
    assert torch.equal(first, again)
    assert (first == other).float().mean() < 0.1
    assert (first[0] == first[1]).float().mean() < 0.1


def test_zero_negative_and_tiny_scores_keep_their_order() -> None:
    scores = torch.tensor([[-1.0, 0.0, 2.0, -0.0, 1e-30, -1e-30, -2.0]]).expand(50, -1)
    ranking = Ranking(50, 7)
    ranking.add(scores, first_query=0, first_document=0)
    found = ranking.result()
    assert found.scores.tolist() == scores.sort(descending=True).values.tolist()
    assert found.indices[:, [0, 1, 4, 5, 6]].tolist() == [[2, 4, 5, 0, 6]] * 50
    assert {tuple(row) for row in found.indices[:, 2:4].tolist()} == {(1, 3), (3, 1)}, "0.0 and -0.0 are a tie"


def test_fewer_documents_than_k() -> None:
    queries, documents = random_embeddings(3), random_embeddings(5, seed=1)
    found = top_k(queries, documents.split(2), 8)
    assert torch.equal(found.indices, (queries @ documents.T).argsort(descending=True))
    assert top_k(queries, [], 8).indices.shape == (3, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_embedding_that_is_not_finite_is_named_by_its_row(value: float) -> None:
    queries, documents = random_embeddings(3), random_embeddings(5000, seed=1)
    documents[4321, 7] = value
    with pytest.raises(OstroError, match=r"document_blocks: row 4321 is not finite"):
        top_k(queries, documents.split(100), 2)
    queries[2, 0] = value
    with pytest.raises(OstroError, match=r"query_embeddings: row 2 is not finite"):
        top_k(queries, documents.split(100), 2)


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    queries, documents = random_embeddings(4).bfloat16(), random_embeddings(40, seed=1).bfloat16()
    found = top_k(queries, [documents], 3)
    assert torch.equal(found.scores, (queries.float() @ documents.float().T).topk(3).values)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"k: must be >= 1, got 0"):
        top_k(random_embeddings(2), [random_embeddings(2)], 0)
    with pytest.raises(ValueError, match=r"document_blocks: 8 dims, but the queries have 4"):
        top_k(random_embeddings(2, 4), [random_embeddings(2, 8)], 1)

"""Scores an encoder on a held-out set: the whole corpus is encoded and searched, and the rankings are judged.

The search itself is in `search`, the result in `report`; the metrics are those of trec_eval, through ir-measures.
Rankings are handed to it with the scores K, K - 1, ... 1: ties are already broken, at random, and its own rule, the
document id, plays no part.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ostro.data.corpus import Corpus
from ostro.data.evaluation_set import EvaluationSet
from ostro.errors import RecipeError, missing_extra
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import QueryReport, RetrievalReport
from ostro.retrieval.search import TopK, top_k

# Documents encoded at once: enough for the encoder to sort by length, few enough for texts and vectors to be small.
_BLOCK_DOCUMENTS = 16384


class TextEncoder(Protocol):
    """What is evaluated; `ostro.Encoder` is one."""

    def encode_query(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N, D]` of queries."""

    def encode_document(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N, D]` of documents."""


def evaluate(
    encoder: TextEncoder, evaluation: EvaluationSet, options: EvaluateOptions, *, seed: int = 0
) -> RetrievalReport:
    """Encodes queries and corpus, searches exactly by inner product, and judges what was found.

    Args:
        encoder: Turns texts into vectors; cosine where they are normalised.
        evaluation: The held-out set, as `open_evaluation(options.path, options.split)` gives it.
        options: Cut-offs and number of queries.
        seed: Decides the order of documents with equal scores.

    Returns:
        Metrics, rankings and times.

    Raises:
        RecipeError: When a cut-off exceeds the number of documents.
        OstroError: When an embedding is not finite, or ir-measures is not installed.
    """
    query_ids, measures = select_queries(evaluation, options), load_measures(options.ks)
    started = time.perf_counter()
    queries = encoder.encode_query([evaluation.queries[query_id] for query_id in query_ids])
    blocks = _EncodedBlocks(encoder, evaluation.corpus)
    encode_s = time.perf_counter() - started
    found = top_k(queries, blocks, max(options.ks), seed=seed)
    encode_s += blocks.seconds
    seconds = {"encode_s": encode_s, "search_s": time.perf_counter() - started - encode_s}
    return judge(evaluation, query_ids, found, measures, seconds)


class _EncodedBlocks:
    """Embeddings of the corpus, block by block in order, and the time it took to make them."""

    def __init__(self, encoder: TextEncoder, corpus: Corpus) -> None:
        self.seconds = 0.0
        self._encoder, self._corpus = encoder, corpus

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self._corpus), _BLOCK_DOCUMENTS):
            started = time.perf_counter()
            rows = range(first, min(first + _BLOCK_DOCUMENTS, len(self._corpus)))
            embeddings = self._encoder.encode_document([self._corpus.text(row) for row in rows])
            self.seconds += time.perf_counter() - started
            yield embeddings


def select_queries(evaluation: EvaluationSet, options: EvaluateOptions) -> list[str]:
    """Ids of the queries to score: all, or a draw that is the same in every evaluation, so that scores can be compared.

    Raises:
        RecipeError: When a cut-off exceeds the number of documents.
    """
    if max(options.ks) > len(evaluation.corpus):
        raise RecipeError(
            f"ks: {evaluation.name} has {len(evaluation.corpus)} documents, fewer than k = {max(options.ks)}; lower ks"
        )
    query_ids = list(evaluation.queries)
    if options.max_queries is None or options.max_queries >= len(query_ids):
        return query_ids
    return random.Random(0).sample(query_ids, options.max_queries)


def load_measures(ks: Sequence[int]) -> dict[Any, str]:
    """The measures of ir-measures and our names for them, such as `nDCG@10`.

    Called before the corpus is encoded, so that a missing package costs no work.

    Raises:
        OstroError: When ir-measures is not installed.
    """
    try:
        from ir_measures import AP, RR, R, nDCG
    except ImportError as error:
        raise missing_extra("eval", "ir-measures") from error
    named = {"nDCG": nDCG, "Recall": R, "MRR": RR, "MAP": AP}
    return {measure @ k: f"{name}@{k}" for k in ks for name, measure in named.items()}


def judge(
    evaluation: EvaluationSet,
    query_ids: Sequence[str],
    found: TopK,
    measures: Mapping[Any, str],
    seconds: Mapping[str, float],
) -> RetrievalReport:
    """Scores rankings against the graded labels of the set.

    With g(r) the grade of the document at rank r (0 if unlabelled) and R the number of relevant documents, grade >= 1:
    nDCG@k = sum over r <= k of g(r) / log2(r + 1), divided by that of the best possible ranking; Recall@k = relevant in
    the first k / R; MRR@k = 1 / rank of the first relevant, 0 beyond k; MAP@k = sum of the precisions at the relevant
    ranks <= k, divided by R. Each is averaged over queries.

    Args:
        evaluation: The held-out set.
        query_ids: Id of each row of `found`.
        found: `[Q, K]`, K at least every cut-off.
        measures: From `load_measures`.
        seconds: Wall time by part, for the report.

    Returns:
        The report.

    Source: trec_eval's `ndcg_cut` (gain = grade), `recall`, `recip_rank` and `map_cut`.
    """
    import ir_measures

    document_ids = {row: evaluation.corpus.id(row) for row in found.indices.unique().tolist()}
    rankings = [[document_ids[row] for row in rows] for rows in found.indices.tolist()]
    run = {
        query_id: {document_id: float(len(ranking) - row) for row, document_id in enumerate(ranking)}
        for query_id, ranking in zip(query_ids, rankings, strict=True)
    }
    qrels = {query_id: dict(evaluation.qrels[query_id]) for query_id in query_ids}
    results = ir_measures.iter_calc(list(measures), qrels, run)
    values = {(result.query_id, result.measure): float(result.value) for result in results}
    queries = []
    for query_id, ranking, scores in zip(query_ids, rankings, found.scores.tolist(), strict=True):
        ranks = {document_id: rank for rank, document_id in enumerate(ranking, 1)}
        relevant = {document_id: ranks.get(document_id) for document_id, grade in qrels[query_id].items() if grade > 0}
        own = {name: values[query_id, measure] for measure, name in measures.items()}
        queries.append(QueryReport(query_id, own, tuple(zip(ranking, scores, strict=True)), relevant))
    metrics = {name: statistics.fmean(query.metrics[name] for query in queries) for name in measures.values()}
    return RetrievalReport(evaluation.name, metrics, tuple(queries), len(evaluation.corpus), seconds)

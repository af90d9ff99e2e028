"""BM25 on a held-out set: the yardstick that a trained model should beat.

It scores words in common, weighted by rarity (Robertson and Zaragoza 2009), with the settings of Lucene: k1 1.2, b
0.75, Snowball stems, 33 stop words. Scoring is left to bm25s; ties, of which zero has many, are broken as for a model.
"""

from __future__ import annotations

import time

import torch

from ostro.data.evaluation_set import EvaluationSet
from ostro.errors import missing_extra
from ostro.retrieval.evaluate import judge, load_measures, select_queries
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import RetrievalReport
from ostro.retrieval.search import Ranking

# Dense scores held at once: a chunk of queries times the whole corpus.
_CHUNK_SCORES = 1 << 21


def bm25(evaluation: EvaluationSet, options: EvaluateOptions, *, seed: int = 0) -> RetrievalReport:
    """Ranks the corpus by BM25 for the queries that `evaluate` scores.

    The token ids of the whole corpus are held in memory.

    Args:
        evaluation: The held-out set.
        options: Cut-offs and number of queries.
        seed: Decides the order of documents with equal scores.

    Returns:
        Metrics, rankings and times, as from `evaluate`.

    Raises:
        RecipeError: When a cut-off exceeds the number of documents.
        OstroError: When bm25s, PyStemmer or ir-measures is not installed.

    Source: Lucene's variant of BM25 as in Kamphuis et al. 2020, "Which BM25 do you mean?".
    """
    try:
        import bm25s
        from bm25s.tokenization import Tokenizer
    except ImportError as error:
        raise missing_extra("search", "bm25s") from error
    try:
        import Stemmer
    except ImportError as error:
        raise missing_extra("search", "PyStemmer") from error
    query_ids, measures = select_queries(evaluation, options), load_measures(options.ks)
    corpus = evaluation.corpus
    started = time.perf_counter()
    tokenizer = Tokenizer(stopwords="english", stemmer=Stemmer.Stemmer("english"))
    documents = list(tokenizer.streaming_tokenize(corpus.text(row) for row in range(len(corpus))))
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index((documents, tokenizer.get_vocab_dict()), show_progress=False)
    indexed = time.perf_counter()
    queries = [evaluation.queries[query_id] for query_id in query_ids]
    tokens = list(tokenizer.streaming_tokenize(queries, update_vocab=False, allow_empty=False))
    ranking = Ranking(len(queries), max(options.ks), seed=seed)
    chunk = max(1, _CHUNK_SCORES // len(corpus))
    for first in range(0, len(queries), chunk):
        scores = [torch.from_numpy(index.get_scores_from_ids(query)) for query in tokens[first : first + chunk]]
        ranking.add(torch.stack(scores), first_query=first, first_document=0)
    seconds = {"encode_s": indexed - started, "search_s": time.perf_counter() - indexed}
    return judge(evaluation, query_ids, ranking.result(), measures, seconds)

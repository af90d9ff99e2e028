"""Held-out queries, their corpus and graded labels: what `retrieval.evaluate` searches and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ostro.data.beir import open_beir
from ostro.data.corpus import Corpus


@dataclass(frozen=True)
class EvaluationSet:
    """One split to evaluate on.

    Attributes:
        name: Folder and split, such as `attack/test`.
        queries: Text by id; every query has at least one relevant document.
        corpus: All documents, read from disk on demand.
        qrels: Grade by document id, by query id, in the order of `queries`. Above 0 is relevant; 0 and below was judged
            not relevant; what is not listed was not judged.
    """

    name: str
    queries: Mapping[str, str]
    corpus: Corpus
    qrels: Mapping[str, Mapping[str, int]]


def open_evaluation(path: str, split: str) -> EvaluationSet:
    """Opens a split of a BEIR folder.

    Queries of `queries.jsonl` that have no row in the qrels belong to other splits and are left out. A query that has
    rows but no relevant document cannot be scored and is an error.

    Args:
        path: The folder.
        split: Name of the file in `qrels`, without `.tsv`.

    Raises:
        DataError: For anything wrong in the files, with file and line.
    """
    folder = Path(path)
    opened = open_beir(folder, split)
    queries = {query_id: opened.queries[query_id] for query_id in opened.qrels}
    return EvaluationSet(f"{folder.resolve().name}/{split}", queries, opened.corpus, opened.qrels)

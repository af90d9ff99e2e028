"""BM25 against its formula, and the ties it is full of."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from ostro.errors import OstroError
from ostro.retrieval.bm25 import bm25
from ostro.retrieval.options import EvaluateOptions
from tests.unit.retrieval.sets import evaluation_set

DOCUMENTS = ["The wind blows over the sea", "winds and winds and wind", "a ship will be at sea", "grapes"]
# Lower case, stop words away, Snowball stems.
STEMS = [["wind", "blow", "over", "sea"], ["wind", "wind", "wind"], ["ship", "sea"], ["grape"]]


def lucene(term: str, document: list[str]) -> float:
    """Kamphuis et al. 2020, table 1, Lucene (accurate): k1 1.2, b 0.75."""
    frequency = document.count(term)
    holding = sum(term in other for other in STEMS)
    mean_length = sum(map(len, STEMS)) / len(STEMS)
    weight = math.log(1 + (len(STEMS) - holding + 0.5) / (holding + 0.5))
    return weight * frequency / (frequency + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean_length))


def test_is_the_formula(tmp_path: Path) -> None:
    evaluation = evaluation_set(tmp_path, DOCUMENTS, ["Is it a WINDY sea, or the wind?"], {0: {0: 1}})
    report = bm25(evaluation, EvaluateOptions(path="unused", ks=(4,)))
    terms = ["windi", "sea", "wind"]
    expected = {f"d{i}": sum(lucene(term, stems) for term in terms) for i, stems in enumerate(STEMS)}
    found = dict(report.queries[0].documents)
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == ["d0", "d1", "d2", "d3"]
    assert report.metrics["nDCG@4"] == 1
    assert report.seconds.keys() == {"encode_s", "search_s"}


def test_queries_that_match_nothing_find_what_chance_finds(tmp_path: Path) -> None:
    num_queries = 1000
    texts = [f"wind number {i}" for i in range(50)]
    queries = ["the" if i % 2 else "nothing known" for i in range(num_queries)]
    evaluation = evaluation_set(tmp_path, texts, queries, {i: {0: 1} for i in range(num_queries)})
    metrics = bm25(evaluation, EvaluateOptions(path="unused")).metrics
    # 10 of 50, with a standard error of 1.3 %
    assert metrics["Recall@10"] == pytest.approx(0.2, abs=0.05)


def test_a_document_of_stop_words_only(tmp_path: Path) -> None:
    evaluation = evaluation_set(tmp_path, ["to be or not to be", "wind"], ["wind"], {0: {1: 1}})
    assert bm25(evaluation, EvaluateOptions(path="unused", ks=(1,))).metrics["Recall@1"] == 1


@pytest.mark.parametrize(("module", "package"), [("bm25s", "bm25s"), ("Stemmer", "PyStemmer")])
def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    evaluation = evaluation_set(tmp_path, DOCUMENTS, ["wind"], {0: {0: 1}})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OstroError, match=rf"{package}: not installed; run: pip install 'ostro\[search\]'"):
        bm25(evaluation, EvaluateOptions(path="unused", ks=(1,)))

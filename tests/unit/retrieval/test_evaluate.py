"""Metrics against hand-computed values, and the search of a whole set."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from ostro.data.evaluation_set import EvaluationSet
from ostro.errors import OstroError, RecipeError
from ostro.retrieval import evaluate as evaluate_module
from ostro.retrieval.evaluate import evaluate, select_queries
from ostro.retrieval.options import EvaluateOptions
from tests.unit.retrieval.sets import TableEncoder, evaluation_set

# The query is (1, 0): documents are ranked by their first number, d0, d1, ... d5.
TABLE = {f"text {i}": [1 - i / 10, 0.0] for i in range(6)} | {"first": [1.0, 0.0], "second": [-1.0, 0.0]}


def small_set(folder: Path, qrels: dict[int, dict[int, int]]) -> EvaluationSet:
    return evaluation_set(folder, [f"text {i}" for i in range(6)], ["first", "second"], qrels)


def options(**settings: object) -> EvaluateOptions:
    return EvaluateOptions.model_validate({"path": "unused", "ks": (3,), **settings})


def test_metrics_by_hand(tmp_path: Path) -> None:
    # q0 finds d0 d1 d2 | d3 d4 d5, q1 the reverse.
    labels = {0: {1: 2, 2: 1, 5: 3, 0: -1}, 1: {5: 1, 0: 0}}
    report = evaluate(TableEncoder(TABLE), small_set(tmp_path, labels), options(ks=(3, 1)))
    first, second = report.queries

    gained = 2 / math.log2(3) + 1 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    expected = {"nDCG@3": gained / ideal, "Recall@3": 2 / 3, "MRR@3": 1 / 2, "MAP@3": (1 / 2 + 2 / 3) / 3}
    expected |= {"nDCG@1": 0, "Recall@1": 0, "MRR@1": 0, "MAP@1": 0}
    assert first.metrics == pytest.approx(expected)
    assert list(first.metrics) == list(expected)
    assert first.relevant == {"d1": 2, "d2": 3, "d5": None}
    assert [document_id for document_id, _ in first.documents] == ["d0", "d1", "d2"]
    assert [score for _, score in first.documents] == pytest.approx([1, 0.9, 0.8])

    assert second.metrics == dict.fromkeys(expected, 1.0)
    assert second.relevant == {"d5": 1}
    assert report.metrics == pytest.approx({name: (value + 1) / 2 for name, value in expected.items()})
    assert (report.num_documents, report.name) == (6, f"{tmp_path.name}/test")
    assert set(report.seconds) == {"encode_s", "search_s"}


def test_blocks_of_the_corpus_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {0: {1: 2}, 1: {5: 1}}
    evaluation = small_set(tmp_path, labels)
    whole = evaluate(TableEncoder(TABLE), evaluation, options())
    monkeypatch.setattr(evaluate_module, "_BLOCK_DOCUMENTS", 4)
    assert evaluate(TableEncoder(TABLE), evaluation, options()).queries == whole.queries


def test_a_collapsed_model_scores_at_chance(tmp_path: Path) -> None:
    # The relevant documents are the first and the last: where a fixed rule for ties would put the best or the worst.
    num_documents, num_queries = 50, 1000
    texts = [f"text {i}" for i in range(num_documents)]
    queries = [f"query {i}" for i in range(num_queries)]
    labels = {i: {0 if i % 4 else num_documents - 1: 1} for i in range(num_queries)}
    evaluation = evaluation_set(tmp_path, texts, queries, labels)
    collapsed = TableEncoder({text: [0.6, 0.8] for text in [*texts, *queries]})
    report = evaluate(collapsed, evaluation, options(ks=(10,)))
    # Chance finds the document in the first 10 of 50 for 20 % of the queries, with a standard error of 1.3 %.
    assert report.metrics["Recall@10"] == pytest.approx(0.2, abs=0.05)
    assert report.metrics["MRR@10"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 50, abs=0.02)
    assert evaluate(collapsed, evaluation, options(ks=(10,)), seed=1).metrics != report.metrics


def test_a_draw_of_queries_is_the_same_every_time(tmp_path: Path) -> None:
    queries = [f"query {i}" for i in range(40)]
    evaluation = evaluation_set(tmp_path, ["a", "b", "c"], queries, {i: {0: 1} for i in range(40)})
    drawn = select_queries(evaluation, options(max_queries=10))
    assert len(set(drawn)) == 10
    assert drawn == select_queries(evaluation, options(max_queries=10))
    assert drawn != list(evaluation.queries)[:10]
    assert select_queries(evaluation, options(max_queries=40)) == list(evaluation.queries)


def test_fewer_documents_than_k(tmp_path: Path) -> None:
    evaluation = small_set(tmp_path, {0: {1: 1}})
    with pytest.raises(RecipeError, match=r"^ks: .*/test has 6 documents, fewer than k = 10; lower ks$"):
        evaluate(TableEncoder(TABLE), evaluation, options(ks=(1, 10)))


def test_a_model_that_gives_nan_is_not_scored(tmp_path: Path) -> None:
    evaluation = small_set(tmp_path, {0: {1: 1}})
    with pytest.raises(OstroError, match=r"document_blocks: row 3 is not finite"):
        evaluate(TableEncoder({**TABLE, "text 3": [math.nan, 0.0]}), evaluation, options())


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = small_set(tmp_path, {0: {1: 1}})
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(OstroError, match=r"ir-measures: not installed; run: pip install 'ostro\[eval\]'"):
        evaluate(TableEncoder({}), evaluation, options())  # before anything is encoded


def test_options_refuse_what_cannot_be_scored() -> None:
    for settings in ({"ks": ()}, {"ks": (0,)}, {"max_queries": 0}, {"k": 3}):
        with pytest.raises(ValueError):
            options(**settings)

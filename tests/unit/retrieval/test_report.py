"""What is kept of a search: two files, and samples to look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostro.errors import OstroError
from ostro.retrieval.evaluate import evaluate
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import QueryReport, RetrievalReport
from tests.unit.retrieval.sets import TableEncoder, evaluation_set


def report(values: list[float]) -> RetrievalReport:
    queries = tuple(
        QueryReport(f"q{i}", {"nDCG@2": value}, (("d0", 0.9), ("d1", 0.5)), {"d1": 2, "d2": None})
        for i, value in enumerate(values)
    )
    return RetrievalReport("winds/test", {"nDCG@2": sum(values) / len(values)}, queries, 3, {"search_s": 0.1})


def test_save_writes_the_mean_and_a_row_per_query(tmp_path: Path) -> None:
    report([0.5, 0.0]).save(tmp_path / "new" / "folder")
    summary = json.loads((tmp_path / "new/folder/metrics.json").read_text(encoding="utf-8"))
    assert summary == {
        "name": "winds/test",
        "metrics": {"nDCG@2": 0.25},
        "num_queries": 2,
        "num_documents": 3,
        "seconds": {"search_s": 0.1},
    }
    lines = (tmp_path / "new/folder/per_query.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {
        "query_id": "q1",
        "metrics": {"nDCG@2": 0.0},
        "documents": [["d0", 0.9], ["d1", 0.5]],
        "relevant": {"d1": 2, "d2": None},
    }
    assert len(lines) == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OstroError, match=r"file/x: cannot be written \(Not a directory\)"):
        report([1.0]).save(tmp_path / "file" / "x")


def test_samples_go_from_the_best_to_the_worst(tmp_path: Path) -> None:
    queries = [f"query {i}" for i in range(9)]
    evaluation = evaluation_set(tmp_path, ["a", "b" * 1000, "c"], queries, {i: {2: 1} for i in range(9)})
    samples = report([i / 8 for i in range(9)]).samples(evaluation, num_queries=3, num_documents=1)
    assert [sample["query"] for sample in samples] == ["query 8", "query 4", "query 0"]
    assert [sample["metric"] for sample in samples] == [1.0, 0.5, 0.0]
    assert samples[0]["documents"] == [{"id": "d0", "text": "a", "score": 0.9, "relevant": False}]
    cut, unfound = samples[0]["missed"]
    assert (cut["id"], cut["rank"], cut["text"]) == ("d1", 2, "b" * 239 + "…")
    assert unfound == {"id": "d2", "text": "c", "rank": None}
    json.dumps(samples)


def test_samples_of_fewer_queries_than_asked_for(tmp_path: Path) -> None:
    table = {"x": [1.0], "y": [0.0], "q": [1.0], "r": [1.0]}
    for texts in (["q"], ["q", "r"]):
        labels = {i: {0: 1} for i in range(len(texts))}
        evaluation = evaluation_set(tmp_path / str(len(texts)), ["x", "y"], texts, labels)
        found = evaluate(TableEncoder(table), evaluation, EvaluateOptions(path="unused", ks=(2,)))
        samples = found.samples(evaluation)
        assert [sample["query"] for sample in samples] == texts
        assert [document["relevant"] for document in samples[0]["documents"]] == [True, False]

"""BEIR folders for training and evaluation, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ostro.data.corpus import Corpus, document_key, open_corpus
from ostro.data.evaluation_set import open_evaluation
from ostro.data.records import JsonLines
from ostro.errors import DataError
from tests.unit.data.files import write_beir, write_jsonl

QRELS = [("q2", "d3", 1), ("q0", "d4", 2), ("q0", "d1", 0), ("q0", "d0", -1)]


def test_evaluation_set_holds_graded_labels_and_the_queries_of_its_split(tmp_path: Path) -> None:
    evaluation = open_evaluation(str(write_beir(tmp_path / "small", QRELS, split="test")), "test")
    assert evaluation.name == "small/test"
    assert dict(evaluation.queries) == {"q2": "query 2", "q0": "query 0"}
    assert evaluation.qrels == {"q2": {"d3": 1}, "q0": {"d4": 2, "d1": 0, "d0": -1}}
    assert len(evaluation.corpus) == 6
    assert evaluation.corpus.ids() == ["d0", "d1", "d2", "d3", "d4", "d5"]
    assert [evaluation.corpus.text(4), evaluation.corpus["d4"]] == ["title 4 text 4"] * 2
    assert [evaluation.corpus.text(3), evaluation.corpus["d3"]] == ["text 3"] * 2


def test_qrels_without_header_and_with_windows_line_ends(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "small", QRELS)
    (folder / "qrels" / "train.tsv").write_bytes(b"q1\td1\t1\r\nq1\td2\t3\r\n")
    assert open_evaluation(str(folder), "train").qrels == {"q1": {"d1": 1, "d2": 3}}


def test_corpus_finds_ids_in_any_order_and_no_others(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ({"_id": f"id {i}", "text": f"text {i}"} for i in range(300)))
    corpus = Corpus(JsonLines(path))
    assert all(corpus[f"id {i}"] == corpus.text(i) == f"text {i}" for i in range(300))
    assert "id 300" not in corpus
    with pytest.raises(KeyError):
        corpus["id 300"]


def test_ids_whose_hashes_are_equal_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostro.data.corpus.document_key", lambda document_id: len(document_id))
    corpus = Corpus(JsonLines(write_jsonl(tmp_path / "a.jsonl", ({"_id": x, "text": f"text {x}"} for x in "abc"))))
    assert [corpus[x] for x in "cab"] == ["text c", "text a", "text b"]
    assert "d" not in corpus


def test_document_keys_are_the_same_in_every_process() -> None:
    assert document_key("d1") == 1439193905492355582
    assert min(document_key(str(i)) for i in range(1000)) >= 0


def test_corpus_folder_of_parquet_files(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "merlin_metadata.json").write_text('{"corpus_id": "small"}')
    for part in range(2):
        table = datasets.Dataset.from_dict({"id": [2 * part, 2 * part + 1], "text": [f"a{part}", f"b{part}"]})
        table.to_parquet(tmp_path / "corpus" / f"part-{part}.parquet")
    corpus = open_corpus(tmp_path / "corpus")
    assert {text_id: corpus[text_id] for text_id in corpus} == {"0": "a0", "1": "b0", "2": "a1", "3": "b1"}


def _line(name: str, line: int, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_bytes().split(b"\n")
        lines[line - 1] = content
        (folder / name).write_bytes(b"\n".join(lines))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "text"'), "corpus.jsonl:3: not JSON"),
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "text": "\xe4"}'), "corpus.jsonl:3: not UTF-8"),
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "body": "x"}'), "corpus.jsonl:3: no text: .*'body'"),
        (_line("corpus.jsonl", 3, b'{"text": "x"}'), "corpus.jsonl:3: no id: expected a column _id"),
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "title": " ", "text": ""}'), "corpus.jsonl:3: empty text"),
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "title": 3, "text": "x"}'), "corpus.jsonl:3: title must be text"),
        (_line("corpus.jsonl", 3, b'{"_id": "d2", "text": "\\ud800"}'), "corpus.jsonl:3: character 1 .* surrogate"),
        (_line("corpus.jsonl", 3, b'{"_id": "d1", "text": "x"}'), "corpus.jsonl:3: id 'd1' is already that of .*:2"),
        (_line("queries.jsonl", 1, b'{"_id": "q0", "text": "\t"}'), "queries.jsonl:1: not JSON"),
        (_line("queries.jsonl", 1, b'{"_id": "q0", "text": ""}'), "queries.jsonl:1: empty text"),
        (_line("qrels/train.tsv", 2, b"q2\td9\t1"), "train.tsv:2: unknown document id 'd9'"),
        (_line("qrels/train.tsv", 2, b"q9\td3\t1"), "train.tsv:2: unknown query id 'q9'"),
        (_line("qrels/train.tsv", 2, b"q2\td3"), "train.tsv:2: expected query id, document id and grade.* got 2"),
        (_line("qrels/train.tsv", 2, b"q2\td3\thigh"), "train.tsv:2: the grade must be a whole number, got 'high'"),
        (_line("qrels/train.tsv", 2, b"q0\td4\t1"), "train.tsv:3: document 'd4' has two grades"),
        (_line("qrels/train.tsv", 2, b"q2\td3\t0"), "train.tsv: 1 queries without a positive .*: q2;"),
        (_line("qrels/train.tsv", 2, b"q2\td3\t\xff"), "train.tsv:2: not UTF-8"),
        (lambda folder: (folder / "qrels" / "train.tsv").write_bytes(b"query-id\tcorpus-id\tscore\n"), "no rows"),
        (lambda folder: (folder / "qrels" / "train.tsv").rename(folder / "qrels" / "dev.tsv"), "folder: dev"),
        (lambda folder: (folder / "queries.jsonl").unlink(), "not a BEIR folder"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    folder = write_beir(tmp_path / "small", QRELS)
    change(folder)
    with pytest.raises(DataError, match=f"^{folder}.*{message}"):
        open_evaluation(str(folder), "train")


def test_json_with_ids_as_numbers_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 7, "title": None, "text": "x"}))
    assert open_corpus(path).ids() == ["7"]

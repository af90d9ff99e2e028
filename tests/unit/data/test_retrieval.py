"""Examples from every form the field stores them in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ostro.data.options import SourceOptions
from ostro.data.retrieval import RetrievalExample, RetrievalSource, open_source
from ostro.errors import DataError
from tests.unit.data.files import write_beir, write_jsonl


def _open(path: Path | str, **settings: Any) -> RetrievalSource:
    return open_source(SourceOptions.model_validate({"path": str(path), **settings}), "data.train.0")


def _texts(example: RetrievalExample) -> tuple[list[str], list[str]]:
    documents = example.documents
    return [documents[i] for i in example.positive_ids], [documents[i] for i in example.negative_ids]


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def test_beir_grades_decide_between_positive_and_negative(tmp_path: Path) -> None:
    qrels = [("q2", "d3", 1), ("q0", "d4", 2), ("q0", "d1", 0), ("q0", "d5", 1)]
    source = _open(write_beir(tmp_path / "small", qrels))
    assert len(source) == 2
    assert (source[1].query_id, source[1].query) == ("q0", "query 0")
    assert (source[1].positive_ids, source[1].negative_ids) == (("d4", "d5"), ("d1",))
    assert _texts(source[1]) == (["title 4 text 4", "text 5"], ["text 1"])


INLINE_ROWS = [
    ({"query": " q ", "pos_doc": "p", "neg_doc": ["n", "m"]}, "q", ["p"], ["n", "m"]),
    ({"question": "q", "pos_doc": ["p", "p2", "p"]}, "q", ["p", "p2"], []),
    ({"query": "q", "pos_doc": {"id": 3, "title": "t", "text": "p"}, "neg_doc": None}, "q", ["t p"], []),
    ({"query": "q", "pos_doc": [{"text": "p"}], "neg_doc": [{"text": "n"}, "p"]}, "q", ["p"], ["n"]),
    (
        {"query_id": "7", "query": "q", "positive_passages": [{"docid": "a", "title": "", "text": "p"}]},
        "q",
        ["p"],
        [],
    ),
    ({"anchor": "q", "positive": "p", "negative": "n"}, "q", ["p"], ["n"]),
]


@pytest.mark.parametrize(("row", "query", "positives", "negatives"), INLINE_ROWS)
def test_inline_rows(tmp_path: Path, row: Any, query: str, positives: list[str], negatives: list[str]) -> None:
    source = _open(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert source[0].query == query
    assert _texts(source[0]) == (positives, negatives)


def test_identity_is_the_id_or_else_the_text(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos_doc": {"id": 3, "text": "p"}, "neg_doc": {"title": "a", "text": "b"}}]
    example = _open(write_jsonl(tmp_path / "a.jsonl", rows))[0]
    assert example.query_id == _sha1("q")
    assert (example.positive_ids, example.negative_ids) == (("3",), (_sha1("a b"),))


def test_parquet_and_folders_give_the_same_examples_as_jsonl(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"query": f"q{i}", "pos_doc": [{"id": f"d{i}", "text": "p"}], "neg_doc": [{"id": f"n{i}", "text": "n"}]}
        for i in range(3)
    ]
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    expected = _open(write_jsonl(tmp_path / "a.jsonl", rows))
    for path in (tmp_path / "folder", tmp_path / "folder" / "train-00000-of-00001.parquet"):
        source = _open(path)
        assert [source[i] for i in range(len(source))] == [expected[i] for i in range(3)]


def _write_corpus_ids(tmp_path: Path, row: dict[str, Any] | None = None, **content: Any) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = ({"id": f"d{i}", "title": "t", "text": f"text {i}"} for i in range(4))
    write_jsonl(folder / "corpus.jsonl", documents)
    data = [{"question_id": "7", "question": "q", "corpus_id": "c", "pos_doc": [{"id": "d1"}], "neg_doc": ["d2", "d1"]}]
    data += [row] if row else []
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"corpus": {"path": "corpus"}, "data": data, **content}))
    return path


def test_corpus_id_file(tmp_path: Path) -> None:
    example = _open(_write_corpus_ids(tmp_path))[0]
    assert (example.query_id, example.query) == ("7", "q")
    assert (example.positive_ids, example.negative_ids) == (("d1",), ("d2",))
    assert _texts(example) == (["t text 1"], ["t text 2"])


def test_corpus_id_file_with_a_list_of_one_corpus(tmp_path: Path) -> None:
    path = _write_corpus_ids(tmp_path, corpus=[{"path": str(tmp_path / "corpus")}])
    assert len(_open(path)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "pos_doc": [{"id": "d9"}], "corpus_id": "c"}, "data\\[1\\]: unknown document id 'd9'"),
        ({"question": "q", "pos_doc": [], "corpus_id": "c"}, "data\\[1\\]: query without positive"),
        ({"question": "q", "pos_doc": [{"text": "x"}], "corpus_id": "c"}, "data\\[1\\]: no id: .*\\['text'\\]"),
        ({"question": "", "pos_doc": ["d1"], "corpus_id": "c"}, "data\\[1\\]: empty text"),
        ({"question": "q", "pos_doc": ["d1"], "corpus_id": "b"}, "2 values of corpus_id"),
    ],
)
def test_wrong_rows_of_a_corpus_id_file(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = _write_corpus_ids(tmp_path, row)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        _open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"corpus": [{"path": "a"}, {"path": "b"}]}, "lists 2 corpora, expected one"),
        ({"corpus": "corpus"}, 'corpus must be {"path": file or folder}'),
        ({"data": {}}, "data must be a list of at least one row"),
        ({"data": ["x"]}, "data\\[0\\]: expected an object, got str"),
    ],
)
def test_wrong_corpus_id_files(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = _write_corpus_ids(tmp_path, **content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        _open(path)


def test_broken_corpus_id_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"corpus": {"path": "x"},\n "data": [}')
    with pytest.raises(DataError, match=f"^{path}:2: not JSON"):
        _open(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "q", "pos_doc": "p"}, "no query: expected a column query or question or anchor, got .*'text'"),
        ({"query": 3, "pos_doc": "p"}, "query must be text, got 3"),
        ({"query": " ", "pos_doc": "p"}, "empty text"),
        ({"query": "q", "question": "q", "pos_doc": "p"}, "has both query and question"),
        ({"query": "q"}, "query without positive"),
        ({"query": "q", "pos_doc": []}, "query without positive"),
        ({"query": "q", "pos_doc": ["p", ""]}, "empty text"),
        ({"query": "q", "pos_doc": "p", "neg_doc": [{"id": "n"}]}, "no text: .*\\['id'\\]"),
        ({"query": "q", "pos_doc": 3}, "no text: .*int"),
        ({"query": "\ud800", "pos_doc": "p"}, "lone surrogate"),
    ],
)
def test_wrong_inline_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos_doc": "p"}, row])
    source = _open(path)
    with pytest.raises(DataError, match=f"^{path}:2: .*{message}"):
        source[1]
    with pytest.raises(DataError, match=f"^{tmp_path}/first.jsonl:1: .*{message}"):
        _open(write_jsonl(tmp_path / "first.jsonl", [row]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere/data.jsonl"}, "data.train.0.path: no such file or folder: nowhere/data.jsonl"),
        ({"path": "./nowhere"}, "data.train.0.path: no such file or folder"),
        ({"path": "a.jsonl", "split": "dev"}, "data.train.0.split: .* single file"),
        ({"path": "a.jsonl", "subset": "x"}, "data.train.0.subset: only hub data sets"),
        ({"path": "owner/name"}, "owner/name: split 'train' cannot be loaded"),
    ],
)
def test_wrong_source_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos_doc": "p"}])
    with pytest.raises(DataError, match=f"^{message}"):
        _open(**settings)

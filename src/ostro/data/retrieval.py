"""Training examples for retrieval, from the forms in which the field stores them.

Which examples share a batch, and which of their documents are drawn, is left to `plan`. The idea: an example is a query
and the ids of its labelled documents; texts are looked up by id when a batch needs them. A batch over many ranks can
then be planned on every rank from ids alone.

| format | files | labels |
|---|---|---|
| `beir` | folder with corpus.jsonl, queries.jsonl, qrels/<split>.tsv | grade above 0 positive, else negative |
| `corpus_ids` | JSON `{"corpus": {"path"}, "data": [{question, pos_doc, neg_doc}]}` | ids of documents of the corpus |
| `inline` | JSONL, Parquet or hub rows `query, pos_doc, neg_doc` | texts or objects with text, title, id; one or more |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ostro.data.beir import BeirSplit, is_beir, open_beir
from ostro.data.corpus import Document, check_text, open_corpus, read_document, read_id
from ostro.data.options import DataOptions, SourceOptions
from ostro.data.records import JsonLines, Records, Row, may_be_hub_name, open_hub, open_parquet, read_json_file
from ostro.errors import DataError

# Names that data sets of the field use for the same column; a row has at most one of each.
QUERY_COLUMNS = ("query", "question", "anchor")
POSITIVE_COLUMNS = ("pos_doc", "positive_passages", "positive")
NEGATIVE_COLUMNS = ("neg_doc", "negative_passages", "negative")
QUERY_ID_COLUMNS = ("question_id", "query_id", "_id", "id")

_DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class RetrievalExample:
    """A query and its labelled documents.

    Attributes:
        query_id: Identity of the query: its id, or the SHA-1 of its text where it has none.
        query: Its text, never blank.
        positive_ids: Ids of all documents known to answer it; at least one, none twice.
        negative_ids: Ids of documents labelled as not answering it, none of them also a positive.
        documents: Text by document id; may hold other documents too.
    """

    query_id: str
    query: str
    positive_ids: tuple[str, ...]
    negative_ids: tuple[str, ...]
    documents: Mapping[str, str]


class RetrievalSource(Protocol):
    """Examples by number, read on demand."""

    name: str

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> RetrievalExample:
        """Example `index`, from 0."""


class BeirSource:
    """One example per query of a BEIR split."""

    def __init__(self, name: str, split: BeirSplit) -> None:
        """Wraps an opened split; `name` is for messages."""
        self.name = name
        self._split = split
        self._query_ids = tuple(split.qrels)

    def __len__(self) -> int:
        """Number of queries in the split."""
        return len(self._query_ids)

    def __getitem__(self, index: int) -> RetrievalExample:
        """The example of query `index` in the order of the qrels."""
        query_id = self._query_ids[index]
        grades = self._split.qrels[query_id]
        return RetrievalExample(
            query_id=query_id,
            query=self._split.queries[query_id],
            positive_ids=tuple(document_id for document_id, grade in grades.items() if grade > 0),
            negative_ids=tuple(document_id for document_id, grade in grades.items() if grade <= 0),
            documents=self._split.corpus,
        )


class CorpusIdSource:
    """Examples that name the documents of one corpus by id.

    The examples, which hold ids only, are kept in memory; the corpus stays on disk.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks a file.

        Args:
            path: JSON `{"corpus": {"path": ...}, "data": [...]}`; a relative corpus path starts at the file's folder.

        Raises:
            DataError: For malformed JSON, a missing column, blank text, no positive, or an unknown document id.
        """
        self.name = str(path)
        content = _read_json(path)
        corpus_path, rows = _corpus_path(content, path), content.get("data")
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{path}: data must be a list of at least one row")
        self._corpus = open_corpus(path.parent / corpus_path)
        corpus_ids = {row.get("corpus_id") for row in rows if isinstance(row, dict)}
        if len(corpus_ids) > 1:
            raise DataError(
                f"{path}: rows name {len(corpus_ids)} values of corpus_id, expected one; write a file for each corpus"
            )
        self._examples = tuple(self._example(row, f"{path}: data[{index}]") for index, row in enumerate(rows))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def __getitem__(self, index: int) -> RetrievalExample:
        """The example of row `index`."""
        return self._examples[index]

    def _example(self, row: Any, where: str) -> RetrievalExample:
        query_id, query = _read_query(row, where)
        positive_ids = [self._known_id(entry, where) for entry in _entries(row, POSITIVE_COLUMNS, where)]
        negative_ids = [self._known_id(entry, where) for entry in _entries(row, NEGATIVE_COLUMNS, where)]
        return _labelled(query_id, query, positive_ids, negative_ids, self._corpus, where)

    def _known_id(self, entry: Any, where: str) -> str:
        document_id = read_id(entry, ("id",)) if isinstance(entry, dict) else str(entry)
        if document_id is None:
            raise DataError(
                f"{where}: no id: expected a document id or an object with a column id, got {sorted(entry)}"
            )
        if document_id not in self._corpus:
            raise DataError(f"{where}: unknown document id {document_id!r}; it is not in the corpus")
        return document_id


class InlineSource:
    """Examples that hold the texts of their documents."""

    def __init__(self, name: str, records: Records) -> None:
        """Wraps rows, and reads the first one so that wrong columns show at once.

        Args:
            name: For messages.
            records: Rows with a query and its documents.

        Raises:
            DataError: For a missing column, blank text or no positive in the first row; indexing raises it for others.
        """
        self.name = name
        self._records = records
        self[0]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._records)

    def __getitem__(self, index: int) -> RetrievalExample:
        """The example of row `index`."""
        row, where = self._records[index], self._records.where(index)
        query_id, query = _read_query(row, where)
        positives = [read_document(entry, where) for entry in _entries(row, POSITIVE_COLUMNS, where)]
        negatives = [read_document(entry, where) for entry in _entries(row, NEGATIVE_COLUMNS, where)]
        documents = {document.id: document.text for document in (*negatives, *positives)}
        return _labelled(query_id, query, _ids(positives), _ids(negatives), documents, where)


def open_sources(options: DataOptions) -> tuple[RetrievalSource, ...]:
    """Opens the training sources in the order of `data.train`.

    Raises:
        DataError: For a source that is not there or has wrong rows.
    """
    return tuple(open_source(source, f"data.train.{index}") for index, source in enumerate(options.train))


def open_source(options: SourceOptions, key: str) -> RetrievalSource:
    """Opens one source.

    Args:
        options: Where it is and what form it has.
        key: Its dotted recipe key, for errors.

    Raises:
        DataError: When it is not there, has another form than stated, or has wrong rows.
    """
    path, split = Path(options.path), options.split or _DEFAULT_SPLIT
    source_format = _detect_format(path) if options.format == "auto" else options.format
    if options.split is not None and path.is_file():
        raise DataError(f"{key}.split: {options.path} is a single file without splits; leave split out")
    if options.subset is not None and (path.is_file() or source_format == "beir"):
        raise DataError(f"{key}.subset: only hub data sets have subsets, {options.path} has none; leave subset out")
    if not path.exists() and not may_be_hub_name(options.path):
        raise DataError(f"{key}.path: no such file or folder: {options.path}; give one, or a hub name owner/name")
    if source_format == "beir":
        return BeirSource(options.path, open_beir(path, split))
    if source_format == "corpus_ids":
        return CorpusIdSource(path)
    if path.suffix == ".parquet":
        return InlineSource(options.path, open_parquet([path], path))
    if path.is_file():
        return InlineSource(options.path, JsonLines(path))
    return InlineSource(options.path, open_hub(options.path, subset=options.subset, split=split))


def _detect_format(path: Path) -> str:
    if is_beir(path):
        return "beir"
    return "corpus_ids" if path.suffix == ".json" else "inline"


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json_file(path, "expected one object with corpus and data, for JSON lines set format to inline")
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with corpus and data, got {type(content).__name__}")
    return content


def _corpus_path(content: dict[str, Any], path: Path) -> str:
    corpora = content.get("corpus")
    corpora = corpora if isinstance(corpora, list) else [corpora]
    if len(corpora) != 1:
        raise DataError(f"{path}: corpus lists {len(corpora)} corpora, expected one; write a file for each corpus")
    corpus_path = corpora[0].get("path") if isinstance(corpora[0], dict) else None
    if not isinstance(corpus_path, str):
        raise DataError(f'{path}: corpus must be {{"path": file or folder}}, got {corpora[0]!r}')
    return corpus_path


def _column(row: Any, columns: tuple[str, ...], where: str) -> str | None:
    """The one of several equivalent columns that the row has."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    present = [column for column in columns if row.get(column) is not None]
    if len(present) > 1:
        raise DataError(f"{where}: has both {present[0]} and {present[1]}, which mean the same; keep one")
    return present[0] if present else None


def _read_query(row: Any, where: str) -> tuple[str, str]:
    """Id and text of the query of a row."""
    column = _column(row, QUERY_COLUMNS, where)
    if column is None:
        raise DataError(f"{where}: no query: expected a column {' or '.join(QUERY_COLUMNS)}, got {sorted(row)}")
    if not isinstance(row[column], str):
        raise DataError(f"{where}: {column} must be text, got {row[column]!r}")
    query = check_text(row[column], where)
    return read_id(row, QUERY_ID_COLUMNS) or hashlib.sha1(query.encode()).hexdigest(), query


def _entries(row: Row, columns: tuple[str, ...], where: str) -> list[Any]:
    """Labelled documents of a row: a single one counts as a list of one, a missing column as none."""
    column = _column(row, columns, where)
    if column is None:
        return []
    return row[column] if isinstance(row[column], list) else [row[column]]


def _ids(documents: list[Document]) -> list[str]:
    return [document.id for document in documents]


def _labelled(
    query_id: str,
    query: str,
    positive_ids: list[str],
    negative_ids: list[str],
    documents: Mapping[str, str],
    where: str,
) -> RetrievalExample:
    if not positive_ids:
        raise DataError(
            f"{where}: query without positive: expected at least one document in {' or '.join(POSITIVE_COLUMNS)}"
        )
    positives = tuple(dict.fromkeys(positive_ids))
    negatives = tuple(document_id for document_id in dict.fromkeys(negative_ids) if document_id not in positives)
    return RetrievalExample(query_id, query, positives, negatives, documents)

"""Texts by id: documents of a corpus, and queries, which are stored in the same way.

Which query has which document is left to `beir` and `retrieval`. The idea: per document only a 64-bit hash of its id
and its row number stay in memory (16 bytes); the text is read from the file when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ostro.data.records import JsonLines, Records, Row, open_parquet
from ostro.errors import DataError

TITLE_SEPARATOR = " "
"""Joins title and body into the text of a document, as BEIR (Thakur et al. 2021) does."""

ID_COLUMNS = ("_id", "id", "docid")
"""Names under which files of the field keep the id of a document."""


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        id: Its identity: the id in the file, or the SHA-1 of the text where the file has none.
        text: Title and body joined, never blank.
    """

    id: str
    text: str


def document_key(document_id: str) -> int:
    """A 63-bit hash of a document id, the same in every process: what batches carry, since tensors hold no text."""
    digest = hashlib.blake2b(document_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def read_document(row: Row | str, where: str) -> Document:
    """Reads a document from a row of a corpus or from the entry of a training row.

    Args:
        row: Its text, or an object with `text`, and where known `title` and an id.
        where: File and line, for errors.

    Raises:
        DataError: When there is no text, or it is blank.
    """
    if isinstance(row, str):
        text, document_id = row, None
    elif isinstance(row, dict) and isinstance(row.get("text"), str):
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise DataError(f"{where}: title must be text, got {title!r}")
        text, document_id = title + TITLE_SEPARATOR + row["text"], read_id(row, ID_COLUMNS)
    else:
        columns = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: no text: expected a text, or an object with a column text, got {columns}")
    text = check_text(text, where)
    return Document(hashlib.sha1(text.encode()).hexdigest() if document_id is None else document_id, text)


def check_text(text: str, where: str) -> str:
    """The text without white space around it.

    Raises:
        DataError: When nothing is left, or UTF-8 cannot hold it.
    """
    text = text.strip()
    if not text:
        raise DataError(f"{where}: empty text; remove the row or give it a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start + 1} of the text is a lone surrogate; remove it") from error
    return text


def read_id(row: Row, columns: tuple[str, ...]) -> str | None:
    """The id that a row has under one of the given column names, as text; None where it has none."""
    for column in columns:
        if row.get(column) is not None:
            return str(row[column])
    return None


class Corpus(Mapping[str, str]):
    """Texts by id, in file order, read on demand."""

    def __init__(self, records: Records) -> None:
        """Reads every row once, to check it and to index its id.

        Args:
            records: Rows with an id, `text` and perhaps `title`.

        Raises:
            DataError: For a row without id or text, and for an id that occurs twice.
        """
        self._records = records
        keys = np.fromiter(map(document_key, self), np.int64, len(records))
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        for place in np.flatnonzero(np.diff(self._keys) == 0):
            first, second = (int(row) for row in self._rows[place : place + 2])
            if self.id(first) == self.id(second):
                where = records.where(second)
                raise DataError(
                    f"{where}: id {self.id(second)!r} is already that of {records.where(first)}; ids must be unique"
                )

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        """Ids in file order; one pass over the file, which also checks every row."""
        return (self._document(row, index).id for index, row in enumerate(self._records))

    def __contains__(self, text_id: object) -> bool:
        """Whether there is a text of this id."""
        return isinstance(text_id, str) and self._find(text_id) is not None

    def __getitem__(self, text_id: str) -> str:
        """The text of an id.

        Raises:
            KeyError: When there is none.
        """
        document = self._find(text_id)
        if document is None:
            raise KeyError(text_id)
        return document.text

    def ids(self) -> list[str]:
        """All ids in file order; one pass over the file."""
        return list(self)

    def id(self, index: int) -> str:
        """Id of text `index`, from 0 in file order."""
        return self._document(self._records[index], index).id

    def text(self, index: int) -> str:
        """Text `index`, from 0 in file order; title and body joined."""
        return self._document(self._records[index], index).text

    def _document(self, row: Row, index: int) -> Document:
        where = self._records.where(index)
        if read_id(row, ID_COLUMNS) is None:
            raise DataError(f"{where}: no id: expected a column {' or '.join(ID_COLUMNS)}, got {sorted(row)}")
        return read_document(row, where)

    def _find(self, text_id: str) -> Document | None:
        key = document_key(text_id)
        place = int(np.searchsorted(self._keys, key))
        while place < len(self._keys) and self._keys[place] == key:
            index = int(self._rows[place])
            document = self._document(self._records[index], index)
            if document.id == text_id:
                return document
            place += 1
        return None


def open_corpus(path: Path) -> Corpus:
    """Opens a corpus.

    Args:
        path: A JSONL or Parquet file, or a folder that holds `corpus.jsonl` or Parquet files.

    Raises:
        DataError: When there is no such file, or a row of it is wrong.
    """
    if path.is_dir():
        if (path / "corpus.jsonl").is_file():
            return Corpus(JsonLines(path / "corpus.jsonl"))
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise DataError(f"{path}: holds neither corpus.jsonl nor Parquet files")
        return Corpus(open_parquet(files, path))
    if path.suffix == ".parquet":
        return Corpus(open_parquet([path], path))
    return Corpus(JsonLines(path))

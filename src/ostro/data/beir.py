"""BEIR folders: `corpus.jsonl`, `queries.jsonl` and graded labels in `qrels/<split>.tsv` (Thakur et al. 2021).

Used for training by `retrieval` and for evaluation by `evaluation_set`. Everything is checked when the folder is
opened, so that a wrong id or row is found before the run starts and not in the middle of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ostro.data.corpus import Corpus
from ostro.data.records import JsonLines, read_lines
from ostro.errors import DataError

_MAX_LISTED = 10


@dataclass(frozen=True)
class BeirSplit:
    """One split of a BEIR folder.

    Attributes:
        corpus: All documents of the folder.
        queries: All queries of the folder, also those of other splits.
        qrels: Grade by document id, by query id; only queries of this split. Above 0 is relevant.
    """

    corpus: Corpus
    queries: Corpus
    qrels: Mapping[str, Mapping[str, int]]


def is_beir(folder: Path) -> bool:
    """Whether a folder has the files of a BEIR data set."""
    return (folder / "corpus.jsonl").is_file() and (folder / "queries.jsonl").is_file()


def open_beir(folder: Path, split: str) -> BeirSplit:
    """Opens and checks one split of a BEIR folder.

    Args:
        folder: The folder.
        split: Name of the file in `qrels`, without `.tsv`.

    Raises:
        DataError: For a missing file or split, a malformed or non-UTF-8 line, a row without id or text, an id that
            occurs twice, an unknown query or document id in the qrels, and a query without a relevant document.
    """
    if not is_beir(folder):
        raise DataError(
            f"{folder}: not a BEIR folder; expected corpus.jsonl, queries.jsonl and qrels/{split}.tsv in it"
        )
    qrels_path = folder / "qrels" / f"{split}.tsv"
    if not qrels_path.is_file():
        splits = ", ".join(sorted(file.stem for file in qrels_path.parent.glob("*.tsv"))) or "none"
        raise DataError(f"{qrels_path}: no such file; splits of this folder: {splits}")
    corpus, queries = Corpus(JsonLines(folder / "corpus.jsonl")), Corpus(JsonLines(folder / "queries.jsonl"))
    return BeirSplit(corpus, queries, _read_qrels(qrels_path, corpus, queries))


def _read_qrels(path: Path, corpus: Corpus, queries: Corpus) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, (where, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if len(fields) != 3:
            raise DataError(
                f"{where}: expected query id, document id and grade, separated by tabs, got {len(fields)} fields"
            )
        query_id, document_id, grade = fields
        if number == 0 and not _is_integer(grade):
            continue  # the header, which BEIR has and some copies leave out
        if not _is_integer(grade):
            raise DataError(f"{where}: the grade must be a whole number, got {grade!r}")
        if query_id not in queries:
            raise DataError(f"{where}: unknown query id {query_id!r}; it is not in queries.jsonl")
        if document_id not in corpus:
            raise DataError(f"{where}: unknown document id {document_id!r}; it is not in corpus.jsonl")
        if qrels.setdefault(query_id, {}).setdefault(document_id, int(grade)) != int(grade):
            raise DataError(f"{where}: document {document_id!r} has two grades for query {query_id!r}; keep one")
    if not qrels:
        raise DataError(f"{path}: has no rows; expected query id, document id and grade in each")
    without = [query_id for query_id, grades in qrels.items() if max(grades.values()) <= 0]
    if without:
        listed = ", ".join(without[:_MAX_LISTED])
        raise DataError(
            f"{path}: {len(without)} queries without a positive (no grade above 0): {listed}; remove their rows"
        )
    return qrels


def _is_integer(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()

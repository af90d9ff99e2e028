"""ICD-10-CM as a search task: a clinician's wording finds the official title of a diagnosis code.

A document is a code: `title | parent's title > grandparent's title`. A query is one of the inclusion terms that the
tabular list gives for a code. Both come from the XML that the package `simple-icd-10-cm` carries (a US federal file;
the package is MIT); nothing of it is kept in the repository.

The split is by 3-character category, so that no code of the test queries has a relative in training. Two BEIR folders
are written: `full` with all documents, and `subset` with 500 test queries, their documents and others drawn to 5,000 in
all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.resources
import json
import random
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

VERSION = "1.5.0"
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "ostro-icd10"
_TABULAR = "icd10c-tabular-April-1-2026.xml"
_SUBSET_QUERIES, _SUBSET_DOCUMENTS = 500, 5000
_SEED = 17


class Code(NamedTuple):
    """A diagnosis code with its document and the queries that ask for it."""

    name: str
    document: str
    terms: tuple[str, ...]


def prepare_icd10(folder: Path = DEFAULT_FOLDER) -> tuple[Path, Path]:
    """Writes the two BEIR folders, unless they are there.

    Args:
        folder: Where `full` and `subset` are made.

    Returns:
        The folders of the full corpus (46,881 documents; 10,479 / 555 / 1,499 queries for train / dev / test) and of
        the subset (5,000 documents, 500 test queries).

    Raises:
        SystemExit: When `simple-icd-10-cm` is missing or of another version, whose codes would differ.
    """
    full, subset = folder / "full", folder / "subset"
    if full.is_dir() and subset.is_dir():
        return full, subset
    try:
        found = importlib.metadata.version("simple-icd-10-cm")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise SystemExit(f"simple-icd-10-cm: needs {VERSION}, found {found}; pip install simple-icd-10-cm=={VERSION}")
    codes = list(_read_codes())
    positives: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for code in codes:
        for term in code.terms:
            positives.setdefault(term, []).append(code.name)
            splits.setdefault(term, _split_of(code.name))
    documents = {code.name: code.document for code in codes}
    _write(full, documents, positives, splits)

    draw = random.Random(_SEED)
    queries = draw.sample([term for term, split in splits.items() if split == "test"], _SUBSET_QUERIES)
    kept = dict.fromkeys(name for term in queries for name in positives[term])
    others = [name for name in documents if name not in kept]
    kept |= dict.fromkeys(draw.sample(others, _SUBSET_DOCUMENTS - len(kept)))
    # in the order of the list: the order of a corpus must tell nothing about its labels
    corpus = {name: text for name, text in documents.items() if name in kept}
    _write(subset, corpus, {term: positives[term] for term in queries}, splits)
    return full, subset


def _read_codes() -> Iterator[Code]:
    tabular = importlib.resources.files("simple_icd_10_cm") / "data" / _TABULAR
    for chapter in ElementTree.fromstring(tabular.read_bytes()).iter("chapter"):
        for section in chapter.iter("section"):
            for category in section.findall("diag"):
                yield from _walk(category, ())


def _walk(diag: ElementTree.Element, ancestors: tuple[str, ...]) -> Iterator[Code]:
    """A code and those below it; `ancestors` are the titles above, nearest first."""
    title = _text(diag.find("desc"))
    document = " | ".join(filter(None, (title, " > ".join(ancestors[:2]))))
    terms = dict.fromkeys(_text(note) for note in diag.findall("inclusionTerm/note"))
    yield Code(_text(diag.find("name")), document, tuple(terms))
    for child in diag.findall("diag"):
        yield from _walk(child, (title, *ancestors))


def _text(element: ElementTree.Element | None) -> str:
    assert element is not None, "every code has a name, a title and terms with text"
    return " ".join("".join(element.itertext()).split())


def _split_of(code: str) -> str:
    percent = int(hashlib.sha1(code[:3].encode()).hexdigest()[:8], 16) % 100
    return "test" if percent < 10 else "dev" if percent < 15 else "train"


def _write(folder: Path, documents: dict[str, str], positives: dict[str, list[str]], splits: dict[str, str]) -> None:
    """A BEIR folder, which appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "qrels").mkdir(parents=True)
    ids = {term: f"Q{number}" for number, term in enumerate(positives, start=1)}
    _write_jsonl(partial / "corpus.jsonl", documents.items())
    _write_jsonl(partial / "queries.jsonl", ((ids[term], term) for term in positives))
    for split in sorted({splits[term] for term in positives}):
        rows = [
            f"{ids[term]}\t{name}\t1" for term, names in positives.items() if splits[term] == split for name in names
        ]
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows, ""])
        (partial / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    partial.replace(folder)


def _write_jsonl(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for name, text in texts:
            file.write(json.dumps({"_id": name, "title": "", "text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Writes the folders and prints what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where `full` and `subset` are written")
    for folder in prepare_icd10(parser.parse_args().folder):
        counts = {path.name: sum(1 for _ in path.open(encoding="utf-8")) for path in sorted(folder.rglob("*.*"))}
        print(folder, counts)


if __name__ == "__main__":
    main()

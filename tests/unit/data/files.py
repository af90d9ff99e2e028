"""Small data files in the forms that users have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ostro.data.options import DataOptions


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Writes one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_beir(
    folder: Path,
    qrels: Sequence[tuple[str, str, int]],
    *,
    num_documents: int = 6,
    num_queries: int = 4,
    split: str = "train",
) -> Path:
    """A BEIR folder with documents d0, d1 ... and queries q0, q1 ..., titles on the even documents."""
    (folder / "qrels").mkdir(parents=True)
    documents = (
        {"_id": f"d{i}", "title": "" if i % 2 else f"title {i}", "text": f"text {i}"} for i in range(num_documents)
    )
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", ({"_id": f"q{i}", "text": f"query {i}"} for i in range(num_queries)))
    rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_pairs(path: Path, positives: Sequence[str], *, negatives: Sequence[str] = ()) -> Path:
    """Inline rows: query i with the positive text given for it, and the same negatives everywhere."""
    rows = ({"query": f"query {i}", "pos_doc": text, "neg_doc": list(negatives)} for i, text in enumerate(positives))
    return write_jsonl(path, rows)


def data_options(*paths: Path, weights: Sequence[float] = (), **settings: Any) -> DataOptions:
    """Options over some sources; a small batch where none is given."""
    weights = weights or [1.0] * len(paths)
    train = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    return DataOptions.model_validate({"train": train, "global_batch_queries": 4, **settings})

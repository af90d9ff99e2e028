"""Held-out sets as files, and an encoder that knows the vector of every text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ostro.data.evaluation_set import EvaluationSet, open_evaluation


def evaluation_set(
    folder: Path, documents: Sequence[str], queries: Sequence[str], qrels: Mapping[int, Mapping[int, int]]
) -> EvaluationSet:
    """Opens a BEIR folder made of documents d0, d1 ... and queries q0, q1 ...; grades by query and document number."""
    (folder / "qrels").mkdir(parents=True)
    for name, letter, texts in (("corpus", "d", documents), ("queries", "q", queries)):
        rows = (json.dumps({"_id": f"{letter}{i}", "text": text}) for i, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = [f"q{query}\td{doc}\t{grade}" for query, grades in qrels.items() for doc, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_evaluation(str(folder), "test")


class TableEncoder:
    """Looks vectors up by text; queries and documents share one table."""

    def __init__(self, table: Mapping[str, Sequence[float]]) -> None:
        self.table = table

    def encode_query(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.table[text] for text in texts])

    def encode_document(self, texts: Sequence[str]) -> torch.Tensor:
        return self.encode_query(texts)

"""Options of the retrieval room: which held-out set is searched, and how far down the ranking is scored."""

from __future__ import annotations

import pydantic

from ostro.config import Options, PathField


class EvaluateOptions(Options):
    """One held-out set, searched whole: nDCG, Recall, MRR and MAP at each cut-off."""

    path: PathField
    """BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv` with grades."""
    split: str = "test"
    """Name of the qrels file."""
    ks: tuple[pydantic.PositiveInt, ...] = pydantic.Field((10,), min_length=1)
    """Ranks at which metrics cut: `[10, 100]` gives nDCG@10, nDCG@100 and so on; at most the number of documents."""
    max_queries: int | None = pydantic.Field(None, ge=1)
    """Score a fixed random draw of this many queries; null scores all. The corpus is always searched whole."""

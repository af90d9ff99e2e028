"""What a search over a held-out set gave: mean metrics, and for every query what was found and what should have been.

How it is computed is in `evaluate` and `bm25`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostro.data.evaluation_set import EvaluationSet
from ostro.errors import OstroError

_SAMPLE_CHARS = 240


@dataclass(frozen=True)
class QueryReport:
    """One query.

    Attributes:
        query_id: Its id.
        metrics: Value by name, such as `nDCG@10`.
        documents: Id and score of the documents found, best first, down to the largest cut-off.
        relevant: Rank of every relevant document, from 1; None for one that was not found.
    """

    query_id: str
    metrics: Mapping[str, float]
    documents: tuple[tuple[str, float], ...]
    relevant: Mapping[str, int | None]


@dataclass(frozen=True)
class RetrievalReport:
    """A whole held-out set.

    Attributes:
        name: Folder and split.
        metrics: Mean over queries by name, such as `nDCG@10`, in the order of the options.
        queries: One report per query.
        num_documents: Size of the corpus searched.
        seconds: Wall time by part: `encode_s` (BM25: tokenise and index) and `search_s`.
    """

    name: str
    metrics: Mapping[str, float]
    queries: tuple[QueryReport, ...]
    num_documents: int
    seconds: Mapping[str, float]

    def save(self, folder: str | Path) -> None:
        """Writes `metrics.json` and `per_query.jsonl` (a line per query).

        Args:
            folder: Made where missing.

        Raises:
            OstroError: When it cannot be written.
        """
        summary = {
            "name": self.name,
            "metrics": dict(self.metrics),
            "num_queries": len(self.queries),
            "num_documents": self.num_documents,
            "seconds": dict(self.seconds),
        }
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "metrics.json").write_text(_to_json(summary, indent=2) + "\n", encoding="utf-8")
            with (Path(folder) / "per_query.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(_to_json(vars(query)) + "\n" for query in self.queries)
        except OSError as error:
            raise OstroError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error

    def samples(
        self, evaluation: EvaluationSet, *, num_queries: int = 8, num_documents: int = 5
    ) -> list[dict[str, Any]]:
        """Queries to look at, from the best searched to the worst in even steps, so that failures show in proportion.

        Args:
            evaluation: The set that was searched, for its texts.
            num_queries: Queries to show, at most.
            num_documents: Documents to show for each, at most.

        Returns:
            Plain data, best first: text of the `query`, value of the first `metric`, `documents` (`id`, shortened
            `text`, `score`, `relevant`) and `missed`, the relevant documents not among them (`id`, `text`, `rank`).
        """
        first = next(iter(self.metrics))
        ordered = sorted(self.queries, key=lambda query: query.metrics[first], reverse=True)
        steps = max(min(num_queries, len(ordered)) - 1, 1)
        shown = [ordered[step * (len(ordered) - 1) // steps] for step in range(min(num_queries, len(ordered)))]
        rows = []
        for query in shown:
            found = query.documents[:num_documents]
            documents = [
                {"id": key, "text": _cut(evaluation.corpus[key]), "score": score, "relevant": key in query.relevant}
                for key, score in found
            ]
            missed = [
                {"id": key, "text": _cut(evaluation.corpus[key]), "rank": rank}
                for key, rank in query.relevant.items()
                if rank is None or rank > len(found)
            ]
            text = evaluation.queries[query.query_id]
            rows.append({"query": text, "metric": query.metrics[first], "documents": documents, "missed": missed})
        return rows


def _to_json(data: object, indent: int | None = None) -> str:
    return json.dumps(data, ensure_ascii=False, indent=indent)


def _cut(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARS else text[: _SAMPLE_CHARS - 1].rstrip() + "…"

"""Metrics in columns."""

from __future__ import annotations

from ostro.train.table import metric_table


def test_metrics_stand_in_columns() -> None:
    systems = {"trained": {"nDCG@1000000": 0.5, "MRR@1": 1.0}, "BM25": {"MRR@1": 0.25, "nDCG@1000000": 0.125}}
    assert metric_table(systems).splitlines() == [
        "        nDCG@1000000      MRR@1",
        "trained       0.5000     1.0000",
        "BM25          0.1250     0.2500",
    ]

"""Metrics of several systems as text in columns, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping


def metric_table(systems: Mapping[str, Mapping[str, float]]) -> str:
    """A line of metric names, then a line of values for each system, in columns.

    Args:
        systems: Values by name, the same names for every system, by system.
    """
    width = max(map(len, systems))
    names = next(iter(systems.values()))
    lines = [" ".join([" " * width, *(f"{name:>10}" for name in names)])]
    for system, values in systems.items():
        lines.append(" ".join([f"{system:<{width}}", *(f"{values[name]:>{max(10, len(name))}.4f}" for name in names)]))
    return "\n".join(lines)


def summarise(metrics: Mapping[str, float]) -> str:
    """Metrics on one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())

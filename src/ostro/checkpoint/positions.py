"""What a configuration says about positions, and whether Mistral's own `params.json` beside it says the same.

The idea: one wrong `mscale_all_dim` changes every attention score and breaks nothing, so a model trains and serves
wrongly without an error. (Mistral-Medium-3.5 shipped with 1.0, later corrected to 0.0: an attention scaling of 1.416
instead of 1.) `yarn.apply_scale` of `params.json` tells which is meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostro.checkpoint.files import read_json
from ostro.models.folder import PARAMS_NAME

# Largest difference of the attention scaling between two spellings of the same rope.
_SCALING_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RopeReport:
    """Positions, from the text tower's configuration; None where it says nothing.

    Attributes:
        kind: `yarn`, `default` and so on.
        theta: Base period.
        factor: Context extension.
        original_tokens: Context length before the extension.
        max_tokens: Context length.
        attention_scaling: What cosine and sine are multiplied by.
        llama_4_scaling_beta: Growth of queries with position; 0 is none.
    """

    kind: str
    theta: float | None
    factor: float | None
    original_tokens: int | None
    max_tokens: int | None
    attention_scaling: float
    llama_4_scaling_beta: float | None


def rope_report(text: Mapping[str, Any]) -> RopeReport:
    """Positions as the configuration of a text tower gives them.

    Args:
        text: The text part of `config.json`.
    """
    rope = _rope(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    return RopeReport(
        kind=kind,
        theta=rope.get("rope_theta", text.get("rope_theta")),
        factor=rope.get("factor"),
        original_tokens=rope.get("original_max_position_embeddings"),
        max_tokens=text.get("max_position_embeddings"),
        attention_scaling=_yarn_scaling(rope) if kind == "yarn" else 1.0,
        llama_4_scaling_beta=rope.get("llama_4_scaling_beta"),
    )


def stale_rope(folder: Path, text: Mapping[str, Any]) -> str | None:
    """Where `config.json` and `params.json` of a folder differ about the attention scaling.

    Args:
        folder: The folder; without a `params.json` there is nothing to differ from.
        text: The text part of its `config.json`.

    Returns:
        A sentence with both values; None when they agree.

    Raises:
        LayoutError: When `params.json` cannot be read.
    """
    params = folder / PARAMS_NAME
    yarn = (read_json(params).get("yarn") or {}) if params.is_file() else {}
    report = rope_report(text)
    if report.kind != "yarn" or "apply_scale" not in yarn:
        return None
    apply_scale = bool(yarn["apply_scale"])
    if (abs(report.attention_scaling - 1.0) > _SCALING_TOLERANCE) == apply_scale:
        return None
    return (
        f"config.json has mscale_all_dim {_rope(text).get('mscale_all_dim')}, an attention scaling of "
        f"{report.attention_scaling:.5f}, but yarn.apply_scale of params.json is {str(apply_scale).lower()}, which "
        f"means {'mscale_all_dim 0' if apply_scale else 'a scaling of 1'}; one of the two is "
        "stale, see the release's notes"
    )


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _yarn_scaling(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by.

    Source: Peng et al. 2023 (arXiv:2309.00071), section 3.4; with both mscales, `_compute_yarn_parameters` of
        transformers.
    """
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    growth = 0.1 * math.log(max(rope.get("factor") or 1.0, 1.0))
    if mscale and mscale_all_dim:
        return float((growth * mscale + 1.0) / (growth * mscale_all_dim + 1.0))
    return growth + 1.0

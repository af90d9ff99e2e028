"""Strict recipes: YAML and `key=value` overrides become one validated, frozen object.

Rooms define their options (subclasses of `Options`) next to the code they configure; this file knows how to read, merge, check and describe them,
and nothing of what they mean.
"""

from __future__ import annotations

import pydantic


class Options(pydantic.BaseModel):
    """Base of every block of a recipe: unknown keys are refused and values cannot change after validation."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

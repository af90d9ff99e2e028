"""The loss block of a recipe: defaults, ranges and cross-field checks."""

from __future__ import annotations

import subprocess
import sys

import pydantic
import pytest

from ostro.losses.options import ContrastiveOptions


def test_lists_of_a_recipe_are_accepted() -> None:
    options = ContrastiveOptions.model_validate_json('{"matryoshka_dims": [64, 32], "matryoshka_weights": [1, 0.5]}')
    assert options.matryoshka_dims == (64, 32)
    assert options.matryoshka_weights == (1.0, 0.5)
    assert options.temperature == 0.02


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("temperature", {"temperature": 0}, "greater than 0"),
        ("temperature", {"temperature": float("inf")}, "finite"),
        ("false_negative_margin", {"false_negative_margin": -0.1}, "greater than or equal to 0"),
        ("matryoshka_dims", {"matryoshka_dims": (32, 64)}, r"must be strictly decreasing, got \[32, 64\]"),
        ("matryoshka_dims", {"matryoshka_dims": (64, 64)}, r"must be strictly decreasing, got \[64, 64\]"),
        ("matryoshka_dims", {"matryoshka_dims": (64, 0)}, "greater than 0"),
        (
            "matryoshka_weights",
            {"matryoshka_dims": (64, 32), "matryoshka_weights": (1.0,)},
            r"must have one weight per matryoshka dim \(2\) or be empty, got \[1.0\]",
        ),
        ("matryoshka_weights", {"matryoshka_dims": (64,), "matryoshka_weights": (0.0,)}, "greater than 0"),
        ("margin", {"margin": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_refused_at_their_key(key: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message) as error:
        ContrastiveOptions.model_validate(values)
    assert error.value.errors()[0]["loc"][0] == key


def test_options_do_not_import_torch() -> None:
    code = "import sys, ostro.losses.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What errors say."""

from __future__ import annotations

from ostro.errors import shorten


def test_at_most_ten_keys_are_written_out() -> None:
    assert shorten(["b", "a"]) == "a, b"
    assert shorten(str(digit) for digit in range(12)) == "0, 1, 10, 11, 2, 3, 4, 5, 6, 7 and 2 more"

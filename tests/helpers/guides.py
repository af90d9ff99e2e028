"""The fenced code of a Markdown page, for the tests that run it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; what follows the language on its first line is the file that a reader would save it as."""

    language: str
    name: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*parts) for parts in _FENCE.findall(page.read_text(encoding="utf-8"))]


def code_of(page: Path, language: str) -> list[str]:
    """The text of the blocks of one language, in order."""
    return [block.text for block in blocks(page) if block.language == language]


def refusals(page: Path) -> list[str]:
    """The messages in a guide's table "What it refuses", up to where they are cut."""
    table = page.read_text(encoding="utf-8").partition("## What it refuses")[2]
    return [
        line.split("`")[1].partition("...")[0] for line in table.splitlines() if line.startswith("| ") and "`" in line
    ]

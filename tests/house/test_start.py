"""The command answers at once: help needs no torch and little time."""

from __future__ import annotations

import resource
import subprocess
import sys

MAX_HELP_CPU_S = 0.5

LOADED = """
import sys
{statement}
print([name for name in ("torch", "transformers", "datasets", "matplotlib") if name in sys.modules])
"""


def loaded_by(statement: str) -> str:
    command = [sys.executable, "-c", LOADED.format(statement=statement)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ostro", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < MAX_HELP_CPU_S


def test_help_and_recipes_need_no_torch() -> None:
    assert loaded_by("import ostro.cli") == "[]"
    assert loaded_by("import ostro.config, ostro.train.recipe") == "[]"
    assert loaded_by("import torch") == "['torch']"

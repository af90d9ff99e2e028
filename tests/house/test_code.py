"""The house rules hold for every file of the tree."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house import checks
from tests.house.tree import PACKAGE, ROOT, files

MAX_REACHABLE_CODE = 6800
MAX_RECIPE_LINES = 60
MAX_COMMON_SHARE = 0.35

EVERYWHERE = (checks.long_file, checks.long_functions, checks.broad_excepts, checks.leftovers, checks.vague_names)
IN_THE_PACKAGE = (
    checks.many_parameters,
    checks.probing,
    checks.missing_docstrings,
    checks.missing_annotations,
)

# Third-party modules and our two loops: which files may import them. Prefixes of paths under src/ostro.
DOORS = {
    "safetensors": ("checkpoint/",),
    "torch.distributed.checkpoint": ("checkpoint/",),
    "torch.distributed.fsdp": ("parallel/apply.py",),
    "torch.distributed._composable": ("parallel/apply.py",),
    "torch.distributed.tensor.parallel": ("parallel/apply.py", "parallel/plans.py"),
    "fastapi": ("inference/server.py",),
    "ray": ("inference/ray_engine.py",),
    "uvicorn": ("inference/server.py",),
    "ostro.train.embed": ("cli.py", "train/export_run.py"),
    "ostro.train.vlm": ("cli.py", "train/export_run.py"),
}


def complaints(check: Callable[[str], list[str]], paths: list[Path]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{text}" for path in paths for text in check(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
def test_rules_of_all_code(check: Callable[[str], list[str]]) -> None:
    assert complaints(check, [*files("src", ".py"), *files("tests", ".py"), *files("benchmarks", ".py")]) == []


@pytest.mark.parametrize("check", IN_THE_PACKAGE, ids=lambda check: check.__name__)
def test_rules_of_the_package(check: Callable[[str], list[str]]) -> None:
    paths = files("src", ".py")
    assert len(paths) > 10
    assert complaints(check, paths) == []


def test_no_machine_paths_or_registry_hosts() -> None:
    text_files = [path for path in files() if path.suffix not in (".png", ".gz", ".npy", ".idx", ".html", ".svg")]
    assert complaints(checks.machine_places, text_files) == []


@pytest.mark.parametrize("module", DOORS)
def test_doors(module: str) -> None:
    passing = [
        str(path.relative_to(PACKAGE))
        for path in files("src/ostro", ".py")
        for name in checks.imported_modules(path.read_text(encoding="utf-8"))
        if (name == module or name.startswith(f"{module}."))
        and not str(path.relative_to(PACKAGE)).startswith(DOORS[module])
    ]
    assert passing == [], f"{module} is imported outside {DOORS[module]}"


def test_rooms_open_with_a_docstring_only() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path.relative_to(ROOT)}: only a docstring belongs here"


def test_recipes_fit_a_screen() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files("src/ostro/recipes", ".yaml")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_RECIPE_LINES} == {}


def reachable(start: str) -> dict[str, int]:
    """Lines of code of every first-party module that `start` imports, directly or not."""
    lines: dict[str, int] = {}
    pending = [start]
    while pending:
        module = pending.pop()
        path = PACKAGE.parent.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in lines or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        lines[module] = checks.code_lines(text)
        pending.extend(name for name in checks.imported_modules(text) if name.startswith("ostro."))
    return lines


@pytest.mark.parametrize("loop", ["embed", "vlm"])
def test_a_loop_can_be_read_whole(loop: str) -> None:
    lines = reachable(f"ostro.train.{loop}")
    assert "ostro.config" in lines, "the walk follows imports"
    assert sum(lines.values()) <= MAX_REACHABLE_CODE


def test_the_two_loops_share_little_text() -> None:
    embed, vlm = (
        [
            line.strip()
            for line in (PACKAGE / "train" / f"{loop}.py").read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        for loop in ("embed", "vlm")
    )
    shorter = min(embed, vlm, key=len)
    common = sum((Counter(embed) & Counter(vlm)).values())
    assert 0 < common <= MAX_COMMON_SHARE * len(shorter)

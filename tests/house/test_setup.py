"""What `make setup` installs is pinned, and the Makefile offers what the documents promise."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from tests.house.tree import ROOT

TARGETS = {"help", "setup", "demo", "test", "torture", "check", "bench"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_that_setup_installs_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], "name==version, no local builds"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.findall(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)[0].split(",")
    wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    names = {normal(re.match(r"[\w.-]+", requirement).group()) for requirement in wanted}  # type: ignore[union-attr]
    assert names - {normal(pin.partition("==")[0]) for pin in pins} == set()


def test_make_lists_its_targets() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == TARGETS


def test_continuous_integration_runs_check_and_test() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert [line for line in script.splitlines() if line.startswith("make ")] == ["make check", "make test"]


def test_every_test_file_is_collected() -> None:
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    collected = {line.partition("::")[0] for line in shown.splitlines() if "::" in line}
    assert collected == {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}

"""Help, exit codes and the one line that an error is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ostro as package
from ostro import cli
from tests.cli.conftest import Command

COMMANDS = (
    "train",
    "evaluate",
    "encode",
    "export",
    "inspect",
    "init",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes schema",
)


def test_help_lists_every_command(ostro: Command) -> None:
    outcome = ostro("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert command.split()[0] in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(ostro: Command, command: str) -> None:
    outcome = ostro(*command.split(), "--help")
    assert outcome.code == 0
    lines = [line.strip() for line in outcome.out.splitlines()]
    (example,) = (number for number, line in enumerate(lines) if line.startswith(f"Example: ostro {command}"))
    assert lines[example + 1] == "", "the example does not fit a line, and cannot be copied"


def test_without_a_command_help_is_shown(ostro: Command) -> None:
    outcome = ostro()
    assert (outcome.code, outcome.out) == (2, ostro("--help").out)


def test_the_reference_page_shows_every_command_and_option(ostro: Command) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for command in COMMANDS[:7]:
        assert f"## ostro {command}" in page
        options = {word for word in ostro(command, "--help").out.split() if word.startswith("--")} - {"--help"}
        assert {option for option in options if option not in page} == set(), command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE'."),
        (
            ["train", "embde-demo"],
            "embde-demo: neither a file nor a shipped recipe; nearest shipped recipe: embed-demo",
        ),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "embed-demo", "los.temperature=1"], "los: unknown key; nearest valid key: loss"),
        (
            ["train", "embed-demo", "optimizer.lerning_rate=1"],
            "optimizer.lerning_rate: unknown key; nearest valid key: optimizer.learning_rate",
        ),
        (["train", "embed-demo", "loss.temperature=-1.0"], "loss.temperature: must be > 0, got -1.0"),
        (["train", "embed-demo", "output"], "output: an override is written key.sub=value"),
        (["train", "embed-demo", "output=${env:OSTRO_UNSET}"], "output: environment variable OSTRO_UNSET is not set"),
        (["evaluate", "x"], "Missing option '--data'."),
        (["encode", "x", "--num-dims", "0"], "Invalid value for '--num-dims'"),
        (["encode", "x", "--output", "no/such/folder.npy"], "Invalid value for --output: no/such: no such folder"),
        (["encode", "x", "--colour"], "No such option: --colour"),
        (["init", "x", "--size", "huge"], "size: must be one of tiny, scenes, small, 3b; got 'huge'"),
        (["recipes", "show", "none"], "none: neither a file nor a shipped recipe"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(ostro: Command, words: list[str], message: str) -> None:
    outcome = ostro(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1


def test_failures_exit_1(ostro: Command, tmp_path: Path) -> None:
    for words in (["inspect", tmp_path / "none"], ["encode", tmp_path], ["inspect", tmp_path]):
        outcome = ostro(*words, stdin=b"text\n")
        assert outcome.code == 1, words
        assert outcome.err.startswith("error: ")
        assert str(tmp_path) in outcome.err


def test_operating_system_errors_are_one_line(ostro: Command, weights: Path, tmp_path: Path) -> None:
    outcome = ostro("encode", weights, "--output", tmp_path, stdin=b"text\n")
    assert outcome.code == 1
    assert outcome.err.endswith(f"error: [Errno 21] Is a directory: '{tmp_path}'\n")


def test_debug_adds_the_traceback() -> None:
    for words in (["train", "none.yaml", "--debug"], ["--debug", "train", "none.yaml"]):
        command = [sys.executable, "-m", "ostro", *words]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 2
        assert finished.stderr.startswith("Traceback")
        assert finished.stderr.endswith("error: none.yaml: no such file\n")


def test_interrupt_is_130(ostro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_read_lines", interrupt)
    outcome = ostro("encode", "x")
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def test_version(ostro: Command) -> None:
    outcome = ostro("--version")
    assert (outcome.code, outcome.out) == (0, f"ostro {package.__version__}\n")


def test_installed_command() -> None:
    command = [str(Path(sys.executable).with_name("ostro")), "recipes", "list"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("embed-demo")


def test_public_names_are_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'Encodre'"):
        _ = package.Encodre

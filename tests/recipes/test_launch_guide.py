"""The guide on starting runs: its commands name real recipes and keys, its manifest is YAML with matching times."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ostro.config import load_recipe
from ostro.train.recipe import KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "launch.md").read_text(encoding="utf-8")
MANIFEST = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])  # type: ignore[index]
CONTAINER = MANIFEST["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
COMMANDS = [
    *(match.strip("'") for match in re.findall(r"ostro train (\S+(?: [\w.]+=\S+)*)", TEXT)),
    " ".join([*CONTAINER["command"], *CONTAINER["args"]]).partition("ostro train ")[2],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid_recipes(command: str) -> None:
    name, *overrides = shlex.split(command)
    assert load_recipe(name, overrides, KINDS).kind == "vlm"  # type: ignore[attr-defined]


def test_there_are_commands_for_each_way() -> None:
    assert len(COMMANDS) == 4


def test_a_pod_is_given_longer_than_torchrun_waits() -> None:
    pod = MANIFEST["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    command = CONTAINER["command"]
    assert pod["terminationGracePeriodSeconds"] > int(command[command.index("--shutdown-timeout") + 1])

"""Kills a run on two ranks again and again (`make torture`): it always goes on, and ends as if nothing had happened.

Each start of the run is left to train for a while and then killed with SIGKILL, both ranks or one of them: before its
first step, between two steps, or in the middle of a save. After each kill the next start must go on from the last
published checkpoint; the losses and the exported weights at the end must be those of a run that was not killed, to the
bit. With one rank killed, the other has to end by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file

from ostro.checkpoint.train_state import latest_train_state, load_train_state
from tests.helpers import runs
from tests.helpers.launch import Launch

Aim = Literal["start", "step", "save"]
_NUM_RANKS = 2


class Torture:
    """A recipe, the run that nothing happened to, and the one that is killed.

    Attributes:
        kills: How many came where: in the start, a step or a save; where they fell, not where they were aimed.
    """

    def __init__(self, folder: Path, *, shard: int, num_steps: int, seed: int = 0) -> None:
        """Makes the inputs.

        Args:
            folder: An empty one.
            shard: Ranks that split the weights, 1 or 2.
            num_steps: Length of the run, with a checkpoint after every second step.
            seed: Of the moments.
        """
        self.kills: Counter[str] = Counter()
        self.num_restarts = 0
        self._folder, self._num_steps, self._draw = folder, num_steps, random.Random(seed)
        runs.make_inputs(folder)
        lengths = {"num_steps": num_steps, "save_every": 2, "evaluate_every": None}
        recipe = runs.recipe(folder, folder / "run", train=lengths, loss={"learned_temperature": True})
        settings = recipe.model_dump(mode="json", exclude_unset=True)
        settings |= {"evaluate": None, "test": None, "parallel": {"dp_replicate": -1, "dp_shard": shard}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def run(self, aims: Sequence[Aim]) -> None:
        """Runs undisturbed, then with a kill per aim, and compares.

        Raises:
            AssertionError: When a restart does not go on from the last checkpoint, or the ends differ.
        """
        for aim in aims:
            self._kill_once(aim)
        self._finish("run")
        self._finish("whole")
        compare(self._folder / "run", self._folder / "whole")

    def _launch(self, output: str) -> Launch:
        words = [str(self._folder / "recipe.yaml"), f"output={self._folder / output}"]
        return Launch(words, self._folder / "logs", num_ranks=_NUM_RANKS)

    def _kill_once(self, aim: Aim) -> None:
        checkpoints = self._folder / "run" / "checkpoints"
        published, torn = latest_train_state(checkpoints), _unfinished(checkpoints)
        victims = self._draw.choice([(0, 1), (1, 0), (0,), (1,)])
        with self._launch("run") as launch:
            self._wait_for(aim, launch, torn)
            for rank in victims:
                launch.kill(rank)
            # no step is taken without the other rank, so what is there now stays
            codes = launch.wait()
            assert all(codes[rank] == -9 for rank in victims), f"ended before the kill: {codes}\n{launch.text()}"
            assert all(codes), f"a rank that was left ended well: {codes}\n{launch.text()}"
            assert "Traceback" not in launch.text(), launch.text()
            text = launch.text([0])
        self._check_resumed(text, published)
        steps = [int(step) for step in re.findall(r"^step (\d+) ", text, re.MULTILINE)]
        fell = "save" if _unfinished(checkpoints) - torn else "step" if steps else "start"
        self.kills[fell] += 1
        print(f"kill {self.kills.total()}: ranks {victims} in {fell} (aimed at {aim}), steps {steps}", flush=True)

    def _wait_for(self, aim: Aim, launch: Launch, torn: set[tuple[str, int]]) -> None:
        deadline = time.monotonic() + 120
        if aim == "start":
            time.sleep(self._draw.uniform(0, 2))
            return
        num_rows = self._draw.randint(1, 4)
        while time.monotonic() < deadline:
            assert launch.ranks[0].is_alive(), launch.text()
            if aim == "save" and _unfinished(self._folder / "run" / "checkpoints") - torn:
                time.sleep(self._draw.choice([0, 0.002, 0.005, 0.01]))
                return
            if aim == "step" and launch.text([0]).count("\nstep ") >= num_rows:
                time.sleep(self._draw.uniform(0, 0.3))
                return
            time.sleep(0.0005 if aim == "save" else 0.01)
        raise AssertionError(f"no {aim} within 120 s\n{launch.text()}")

    def _check_resumed(self, text: str, published: Path | None) -> None:
        """Where the start got so far that it says from what it goes on, that is the checkpoint that was last."""
        found = re.search(r"^(.*): continuing after step", text, re.MULTILINE)
        if found is not None:
            self.num_restarts += 1
            assert Path(found[1]) == published
        elif published is not None:
            assert not re.search(r"^step \d", text, re.MULTILINE), f"began anew instead of at {published}\n{text}"

    def _finish(self, output: str) -> None:
        published = latest_train_state(self._folder / output / "checkpoints")
        with self._launch(output) as launch:
            codes = launch.wait(600)
            assert codes == [0] * _NUM_RANKS, launch.text()
            self._check_resumed(launch.text([0]), published)


def _unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when a kill came."""
    return {(path.name, path.stat().st_ino) for path in checkpoints.glob("step-*.tmp") if path.is_dir()}


def compare(killed: Path, whole: Path) -> None:
    """Compares all metrics but those of the clock, the checkpoints at the end, and the exported weights.

    Raises:
        AssertionError: When a bit differs.
    """
    assert _rows(killed) == _rows(whole)
    states: list[Any] = []
    for folder in (killed, whole):
        path = latest_train_state(folder / "checkpoints")
        assert path is not None
        keys = dict.fromkeys(("step", "num_tokens", "weights", "optimizer", "loader", "random", "best"))
        states.append(load_train_state(path, keys))
    _assert_equal(*states)
    exported, expected = (load_file(folder / "weights" / "model.safetensors") for folder in (killed, whole))
    _assert_equal(exported, expected)


def _rows(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "mfu")} for row in rows]


def _assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def main() -> None:
    """Runs the kill test with weights that every rank holds, and with split ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all; half of them with split weights")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw, total, num_restarts = random.Random(arguments.seed), Counter[str](), 0
    for shard, kills in ((1, arguments.kills - arguments.kills // 2), (2, arguments.kills // 2)):
        folder = Path(tempfile.mkdtemp(prefix="torture-"))
        aims = draw.choices(("start", "step", "save"), weights=(1, 2, 2), k=kills)
        # a start that is killed takes up to eight steps that stay
        torture = Torture(folder, shard=shard, num_steps=8 * kills + 8, seed=arguments.seed + shard)
        torture.run(aims)
        print(f"dp_shard={shard}: ends as the run that was not killed", flush=True)
        total += torture.kills
        num_restarts += torture.num_restarts
        shutil.rmtree(folder)
    fell = ", ".join(f"{count} in {where}" for where, count in sorted(total.items()))
    print(f"{total.total()} kills ({fell}), {num_restarts} restarts from a checkpoint: losses, weights and state equal")
    assert total.total() == arguments.kills
    assert total["save"] > 0, "no kill came in the middle of a save"


if __name__ == "__main__":
    main()

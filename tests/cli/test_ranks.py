"""`torchrun -m ostro train`: two processes that write, print and fail as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import runs, vlm_runs

RECIPES = {"embed": runs, "vlm": vlm_runs}


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and `recipe.yaml` for a run of three steps in `run/`."""
    folder = tmp_path_factory.mktemp(f"torchrun-{request.param}")
    helper = RECIPES[request.param]
    helper.make_inputs(folder)
    recipe = helper.recipe(folder, folder / "run", train={"num_steps": 3, "evaluate_every": 2})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    return folder


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command(folder: Path, *overrides: str, max_restarts: int = 0) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    words += ["--max-restarts", str(max_restarts), "-m", "ostro", "train", str(folder / "recipe.yaml"), *overrides]
    return [sys.executable, *words]


def torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, env=ENVIRONMENT, timeout=110)


@pytest.mark.slow
def test_two_processes_train_once(folder: Path) -> None:
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    for text in ("step 1  loss", "step 3  loss", "before training", "weights  "):
        assert done.stdout.count(text) == 1, done.stdout
    assert (folder / "run" / "weights" / "model.safetensors").is_file()
    again = torchrun(folder, "parallel.dp_shard=2")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("continuing after step 3 of 3") == 1


@pytest.mark.parametrize("folder", ["embed"], indirect=True)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stepz=3", "train.num_stepz: unknown key"),
        ("parallel.tp=3", "parallel.tp: the product of the sizes must be the number of ranks, 2"),
    ],
)
def test_an_error_is_told_once(folder: Path, override: str, message: str) -> None:
    failed = torchrun(folder, override)
    assert failed.returncode != 0
    assert failed.stderr.count(f"error: {message}") == 1, failed.stderr
    assert "src/ostro" not in failed.stderr  # torchrun adds a traceback of its own


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("folder", ["embed"], indirect=True)
def test_torchrun_starts_a_run_again_that_lost_a_rank(folder: Path) -> None:
    run = folder / "restarted"
    overrides = [
        f"output={run}",
        "train.num_steps=30",
        "train.save_every=2",
        "evaluate=null",
        "train.evaluate_every=null",
    ]
    words = command(folder, *overrides, "test=null", max_restarts=1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        rank_0 = int((run / "lock").read_text().split()[1])
        os.kill(rank_0, signal.SIGKILL)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count(": continuing after step ") == 1, out
    assert err.count(f"error: rank 0 of 2 (process {rank_0} on ") == 1, err
    assert "src/ostro" not in err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))

"""`torchrun -m ostro train`: two processes that write, print and fail as one."""

from __future__ import annotations

import os
import subprocess
import sys
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


def torchrun(folder: Path, *overrides: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    words += ["--nproc-per-node", str(num_ranks), "-m", "ostro", "train", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=110)


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
    [("train.num_stepz=3", "train.num_stepz: unknown key"), ("parallel.tp=2", "parallel.tp: must be 1, got 2")],
)
def test_an_error_is_told_once(folder: Path, override: str, message: str) -> None:
    failed = torchrun(folder, override)
    assert failed.returncode != 0
    assert failed.stderr.count(f"error: {message}") == 1, failed.stderr
    assert "src/ostro" not in failed.stderr  # torchrun adds a traceback of its own

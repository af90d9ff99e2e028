"""Ranks that are killed, run out of memory or get stuck: the others end with one message, and the run goes on."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import math
import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ostro.checkpoint.train_state import latest_train_state
from ostro.errors import OstroError
from ostro.train import metrics, ranks, watch
from ostro.train.embed import EmbedTrainer
from tests.helpers import runs
from tests.helpers.launch import Launch
from tests.torture import Torture

Act = Callable[[], object]


def errors(launch: Launch) -> list[str]:
    """What all ranks told; a traceback counts."""
    return [line for line in launch.text().splitlines() if line.startswith(("error: ", "Traceback "))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    runs.make_inputs(folder)
    return folder


@pytest.fixture
def recipe_file(inputs: Path, tmp_path: Path) -> Path:
    """Eight steps with a checkpoint after every second, in `run/`, without evaluation."""
    lengths = {"num_steps": 8, "save_every": 2, "evaluate_every": None}
    settings = runs.recipe(inputs, tmp_path / "run", train=lengths).model_dump(mode="json", exclude_unset=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**settings, "evaluate": None, "test": None}))
    return file


def losses(run: Path) -> list[float]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def at_step(step: int, act: Act) -> None:
    """Has something happen before a step of this process."""
    original = EmbedTrainer.train_step

    def train_step(trainer: EmbedTrainer) -> dict[str, float]:
        if trainer.step == step:
            act()
        return original(trainer)

    EmbedTrainer.train_step = train_step  # type: ignore[method-assign]


def die(rank: int, *, dead: int, at: int) -> None:
    if rank == dead:
        at_step(at, lambda: os.kill(os.getpid(), 9))


@pytest.mark.parametrize(("num_ranks", "dead", "override"), [(2, 0, "dp_shard=2"), (3, 2, "dp_shard=1")])
def test_a_killed_rank_is_named_once_and_the_run_goes_on(
    recipe_file: Path, tmp_path: Path, num_ranks: int, dead: int, override: str
) -> None:
    words = [str(recipe_file), f"parallel.{override}"]
    with Launch(words, tmp_path / "logs", num_ranks=num_ranks, before=partial(die, dead=dead, at=7)) as launch:
        started = time.monotonic()
        codes = launch.wait()
        assert codes == [-9 if rank == dead else 1 for rank in range(num_ranks)]
        assert time.monotonic() - started < 30
        told = [line for line in launch.text().splitlines() if "error" in line]
        assert len(told) == 1, launch.text()
        assert told[0].startswith(f"error: rank {dead} of {num_ranks} (process {launch.ranks[dead].pid} on ")
        assert told[0].endswith("; run the same command again to go on")
        assert "Traceback" not in launch.text()
    saved = latest_train_state(tmp_path / "run" / "checkpoints")
    assert saved is not None
    with Launch(words, tmp_path / "logs", num_ranks=num_ranks) as launch:
        assert set(launch.wait()) == {0}
        assert f"{saved}: continuing after step" in launch.text()
    assert len(losses(tmp_path / "run")) == 8


def stick(rank: int) -> None:
    """Rank 1 dies; rank 0 notices no failed collective, as under NCCL."""
    watch._GRACE_S = 1.0  # type: ignore[misc]
    at_step(3, lambda: os.kill(os.getpid(), 9) if rank else time.sleep(100))


def test_a_rank_that_is_stuck_ends_too(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file)], tmp_path / "logs", before=stick) as launch:
        assert launch.wait(30) == [1, -9]
        assert launch.logs[0].read_text().count("error: rank 1 of 2 (process ") == 1


def run_out_of_memory(rank: int) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore text")

    if rank == 1:
        at_step(3, fail)


def test_a_rank_out_of_memory_tells_and_the_others_are_silent(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file)], tmp_path / "logs", before=run_out_of_memory) as launch:
        assert launch.wait() == [1, 1]
        silent, told = (log.read_text() for log in launch.logs)
        assert told.splitlines()[-1].startswith("error: data.micro_batch_tokens: too large for the memory (CUDA out of")
        assert launch.text().count("error") == 1, launch.text()
        assert "Traceback" not in silent + told


def too_little_memory(rank: int) -> None:
    """Rank 1 asks for more than any machine has."""

    def to_empty(module: torch.nn.Module, *, device: object) -> None:
        torch.empty(2**60)

    if rank == 1:
        torch.nn.Module.to_empty = to_empty  # type: ignore[assignment]


def test_a_model_that_does_not_fit_is_told_once(recipe_file: Path, tmp_path: Path) -> None:
    words = [str(recipe_file), "parallel.dp_shard=2"]
    with Launch(words, tmp_path / "logs", before=too_little_memory) as launch:
        assert launch.wait() == [1, 1]
        [told] = errors(launch)
        assert told.startswith("error: model.weights: the model does not fit the memory ([enforce fail")
        assert told.endswith("; split it over more ranks (parallel.dp_shard, parallel.tp), or set model.dtype=bfloat16")
        assert told in launch.logs[1].read_text()


def spoil(rank: int) -> None:
    original = EmbedTrainer._backward

    def backward(trainer: EmbedTrainer, batch: Any) -> Any:
        output = original(trainer, batch)
        is_spoilt = rank == 1 and trainer.step == 3
        return dataclasses.replace(output, loss=output.loss * math.nan) if is_spoilt else output

    EmbedTrainer._backward = backward  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_stops_all_with_a_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file), "parallel.dp_shard=2"], tmp_path / "logs", before=spoil) as launch:
        assert launch.wait() == [1, 1]
        last = launch.logs[0].read_text().splitlines()[-1]
        assert last.startswith("error: loss: is nan; the weights were not changed.")
        assert f"Stopped after step 3 of 8 and saved {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}" in last
        assert launch.text().count("error") == 1, launch.text()
    with Launch([str(recipe_file)], tmp_path / "logs") as launch:
        assert launch.wait() == [0, 0]
    assert len(losses(tmp_path / "run")) == 8


def miss(rank: int, *, variable: str, value: str | None) -> None:
    """Rank 1 comes with another value of a variable, or not at all."""
    ranks._MEETING = datetime.timedelta(seconds=2)  # type: ignore[misc]
    if rank == 1 and value is None:
        os._exit(1)
    if rank == 1:
        os.environ[variable] = value or ""


@pytest.mark.parametrize(
    ("variable", "value"), [("RANK", None), ("MASTER_PORT", "1"), ("WORLD_SIZE", "3")]
)
def test_ranks_that_do_not_meet_are_told_by_rank_0(
    recipe_file: Path, tmp_path: Path, variable: str, value: str | None
) -> None:
    with Launch([str(recipe_file)], tmp_path / "logs", before=partial(miss, variable=variable, value=value)) as launch:
        assert launch.wait(30) == [1, 1]
        [told] = errors(launch)
        assert told.startswith("error: MASTER_ADDR, MASTER_PORT: the ranks do not meet at 127.0.0.1:")
        assert told.endswith("and start 2 ranks (WORLD_SIZE), each with its own RANK")
        assert told in launch.logs[0].read_text()


def test_variables_that_are_missing_are_told_by_one_rank(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file)], tmp_path / "logs", missing=["MASTER_ADDR", "LOCAL_RANK"]) as launch:
        assert launch.wait() == [1, 1]
        told, silent = (log.read_text() for log in launch.logs)
        assert told.startswith("error: LOCAL_RANK, MASTER_ADDR: not set, while RANK is 0; start the run with torchrun")
        assert silent == ""


def test_an_output_that_cannot_be_written_is_told_once(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Launch([str(recipe_file), f"output={tmp_path / 'file' / 'run'}"], tmp_path / "logs") as launch:
        assert launch.wait() == [1, 1]
        assert launch.logs[0].read_text().startswith(f"error: {tmp_path / 'file' / 'run'}: cannot be written (Not a")
        assert launch.logs[1].read_text() == ""


def test_a_torn_checkpoint_is_passed_over_with_one_warning(recipe_file: Path, tmp_path: Path) -> None:
    at_once = "train.async_save=false"
    with Launch([str(recipe_file), at_once], tmp_path / "logs", before=partial(die, dead=1, at=5)) as launch:
        assert launch.wait() == [1, -9]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {"step-00000002", "step-00000004"} <= set(os.listdir(checkpoints))
    (checkpoints / "step-00000004" / ".metadata").unlink()
    with Launch([str(recipe_file)], tmp_path / "logs") as launch:
        assert launch.wait() == [0, 0]
        assert launch.text().count("passed over damaged checkpoints") == 1
        assert f"{checkpoints / 'step-00000002'}: continuing after step 2 of 8" in launch.text()
    assert len(losses(tmp_path / "run")) == 8


def fill_disk(rank: int, *, full: int) -> None:
    """From the fifth step on, one rank cannot write large files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    if rank == full:
        at_step(5, limit)


@pytest.mark.parametrize(
    ("full", "override", "reason"),
    [
        (0, "dp_shard=1", "File too large"),
        (1, "dp_shard=2", "a rank could not write its file, as on a full disk"),
    ],
)
def test_a_full_disk_of_one_rank_is_told_once(
    recipe_file: Path, tmp_path: Path, full: int, override: str, reason: str
) -> None:
    words = [str(recipe_file), f"parallel.{override}", "train.async_save=false"]
    with Launch(words, tmp_path / "logs", before=partial(fill_disk, full=full)) as launch:
        assert launch.wait(30) == [1, 1]
        told = f"error: {tmp_path / 'run' / 'checkpoints' / 'step-00000006'}: cannot be written ({reason})"
        assert launch.text().count(told) == launch.text().count("error") == 1, launch.text()
    latest = latest_train_state(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.name == "step-00000004"
    with Launch([str(recipe_file)], tmp_path / "logs") as launch:
        assert launch.wait() == [0, 0]
    assert len(losses(tmp_path / "run")) == 8


def make_read_only(rank: int) -> None:
    """The disk of the output, which a test's user may write to whatever its mode says."""

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    Path.mkdir = mkdir  # type: ignore[method-assign]


def test_a_read_only_disk_is_told_once(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file)], tmp_path / "logs", before=make_read_only) as launch:
        assert launch.wait() == [1, 1]
        told = f"error: {tmp_path / 'run'}: cannot be written (Read-only file system); choose another `output`"
        assert errors(launch) == [told]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("recipe.yaml", "dp_shard=1", "run: cannot be written (No space left on device); choose another `output`"),
        ("metrics.jsonl", "dp_shard=1", "cannot be written (No space left on device); make room there. Stopped after"),
        ("result.json", "dp_shard=1", "run: a file cannot be written (No space left on device); make room and run the"),
        ("metrics.jsonl", "dp_shard=2", "cannot be written (No space left on device); make room there. Stopped after"),
    ],
)
def test_a_disk_that_is_full_for_small_files_is_told_once(
    recipe_file: Path, tmp_path: Path, name: str, override: str, message: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with Launch([str(recipe_file), f"parallel.{override}"], tmp_path / "logs") as launch:
        assert launch.wait(30) == [1, 1]
        [told] = errors(launch)
        assert message in told
        assert told in launch.logs[0].read_text()


def refuse_scores(rank: int) -> None:
    """The scores after step 3 find no room any more."""
    original = metrics.MetricsFile.log

    def log(file: metrics.MetricsFile, step: int, row: Any) -> None:
        if step == 3 and "evaluation" in row:
            raise OstroError("metrics.jsonl: cannot be written (No space left on device)")
        original(file, step, row)

    if rank == 0:  # what the others log goes nowhere
        metrics.MetricsFile.log = log  # type: ignore[method-assign]


def refuse_lines(rank: int) -> None:
    """What rank 0 prints to is full."""

    def show(line: metrics.LiveLine, step: int, row: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 0:
        metrics.LiveLine.show = show  # type: ignore[method-assign]


@pytest.mark.parametrize(("before", "step"), [(refuse_scores, 3), (refuse_lines, 1)])
def test_scores_and_lines_that_find_no_room_stop_all_with_a_checkpoint(
    inputs: Path, tmp_path: Path, before: Callable[[int], None], step: int
) -> None:
    recipe = runs.recipe(inputs, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "test": None}))
    with Launch([str(tmp_path / "recipe.yaml")], tmp_path / "logs", before=before) as launch:
        assert launch.wait(30) == [1, 1]
        [told] = errors(launch)
        assert "No space left on device" in told
        assert f". Stopped after step {step} of 6 and saved" in told


def test_a_checkpoint_of_another_model_is_told_once(recipe_file: Path, tmp_path: Path) -> None:
    with Launch([str(recipe_file), "train.num_steps=2"], tmp_path / "logs") as launch:
        assert launch.wait() == [0, 0]
    # the folder's recipe says so, and its checkpoint does not
    settings = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    settings["loss"]["learned_temperature"] = True
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    words = [str(recipe_file), "train.num_steps=2", "loss.learned_temperature=true", "parallel.dp_shard=2"]
    with Launch(words, tmp_path / "logs") as launch:
        assert launch.wait() == [1, 1]
        assert launch.text().count("error") == 1, launch.text()
        assert "other tensors than this run's; missing: " in launch.text()


def test_two_jobs_do_not_share_a_folder(recipe_file: Path, tmp_path: Path) -> None:
    words = [str(recipe_file), "train.num_steps=500"]
    with Launch(words, tmp_path / "first") as first:
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert first.ranks[0].is_alive(), first.text()
            time.sleep(0.02)
        before = (tmp_path / "run" / "recipe.yaml").read_text()
        with Launch([str(recipe_file), "train.num_steps=600"], tmp_path / "second") as second:
            assert second.wait() == [1, 1]
            told, silent = (log.read_text().splitlines() for log in second.logs)
            holder = f"process {first.ranks[0].pid} on {socket.gethostname()}"
            assert told[-1].startswith(f"error: output: {tmp_path / 'run'} is in use by {holder}; ")
            assert silent == []
        assert (tmp_path / "run" / "recipe.yaml").read_text() == before
        assert all(rank.is_alive() for rank in first.ranks)
        first.kill(0)
        assert first.wait() == [-9, 1]
    with Launch([*words, "train.save_every=400"], tmp_path / "third") as third:
        while "continuing after step" not in third.text():
            assert third.ranks[0].is_alive(), third.text()
            time.sleep(0.02)


def test_kills_at_any_moment_change_no_bit(tmp_path: Path) -> None:
    """The short form of `make torture`."""
    torture = Torture(tmp_path, shard=2, num_steps=14)
    torture.run(["save", "step", "start", "save"])
    assert torture.kills.total() == 4
    assert torture.kills["save"] > 0, torture.kills
    assert torture.num_restarts >= 2

"""Train state comes back exactly, whatever stops a save, and never from a damaged folder."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostro.checkpoint.train_state import latest_train_state, load_train_state, save_train_state, tensor_names
from ostro.errors import CheckpointError
from tests.helpers.disk import full_disk


def state_at(step: int) -> dict[str, Any]:
    """A state with every kind of value; each tensor is filled with the step."""
    generator = np.random.default_rng(step)
    generator.random(3)
    return {
        "step": step,
        "weights": {
            "layers.0.weight": torch.full((3, 4), float(step)),
            "layers.0.scale": torch.tensor(step / 7, dtype=torch.float64),
            "norm": torch.full((5,), step, dtype=torch.bfloat16),
            "fp8": torch.full((2, 2), float(step % 16)).to(torch.float8_e4m3fn),
            "transposed": torch.arange(6.0).view(2, 3).t() + step,
            "none": torch.empty(0, 3),
        },
        "optimizer": {0: {"moment": torch.full((3,), step / 3), "step": torch.tensor(float(step))}, "lr": step * 1e-3},
        "schedule": {"kind": "cosine", "warmup": (1, 2.5, None), "history": [0.1 + 0.2, float("inf")], "done": False},
        "data": {"epoch": 1, "order": [3, 1, 2], "seen": {"a": (1, 2)}, "big": 2**200, "empty": {}},
        "random": {"python": random.Random(step).getstate(), "numpy": generator.bit_generator.state},
        "torch_random": {"cpu": torch.Generator().manual_seed(step).get_state()},
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Equal in structure, type and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.double(), expected.double())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    else:
        assert found == expected


def test_everything_comes_back_and_tensors_in_place(tmp_path: Path) -> None:
    path = save_train_state(tmp_path, 100, state_at(100), keep_last=2)
    assert path == latest_train_state(tmp_path) == tmp_path / "step-00000100"
    now = state_at(3)
    loaded = load_train_state(path, now)
    assert_equal(loaded, state_at(100))
    for block in ("weights", "torch_random"):
        for name, tensor in now[block].items():
            assert loaded[block][name].data_ptr() == tensor.data_ptr()
    assert now["step"] == 3


def test_parameters_are_loaded_in_place(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    saved = layer.weight.detach().clone()
    path = save_train_state(tmp_path, 1, {"model": dict(layer.named_parameters())}, keep_last=1)
    with torch.no_grad():
        layer.weight.zero_()
    load_train_state(path, {"model": dict(layer.named_parameters())})
    assert torch.equal(layer.weight, saved)
    assert layer.weight.requires_grad


def test_an_optimizer_before_its_first_step_takes_what_was_saved(tmp_path: Path) -> None:
    def run(num_steps: int, resume_from: Path | None = None) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        if resume_from:
            now = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
            optimizer.load_state_dict(load_train_state(resume_from, now)["optimizer"])
        for _ in range(num_steps):
            optimizer.zero_grad()
            layer(torch.tensor([[1.0, 2.0, 3.0]])).square().sum().backward()
            optimizer.step()
        return layer, optimizer

    layer, optimizer = run(2)
    state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    path = save_train_state(tmp_path, 2, state, keep_last=1)
    assert torch.equal(run(1, resume_from=path)[0].weight, run(3)[0].weight)


def test_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save_train_state(tmp_path, step, {"x": torch.tensor(step)}, keep_last=2, keep=(20,))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000020", "step-00000040", "step-00000050"]


def test_going_back_continues_from_there(tmp_path: Path) -> None:
    for step in (10, 20):
        save_train_state(tmp_path, step, {"step": step}, keep_last=3)
    path = save_train_state(tmp_path, 15, {"step": 15}, keep_last=2)
    assert latest_train_state(tmp_path) == path
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000015", "step-00000020"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = save_train_state(tmp_path, 7, {"x": torch.tensor(value)}, keep_last=1)
    assert load_train_state(path, {"x": torch.tensor(0.0)})["x"] == 2.0
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]


def test_what_another_rank_holds_is_neither_read_nor_missed(tmp_path: Path) -> None:
    saved = {"weights": {"here": torch.ones(3), "there": torch.ones(2)}, "step": 4}
    path = save_train_state(tmp_path, 4, saved, keep_last=1)
    own = {"weights": {"here": torch.zeros(3)}, "step": 0}
    with pytest.raises(CheckpointError, match=r"unexpected: weights\.there"):
        load_train_state(path, own)
    loaded = load_train_state(path, own, elsewhere=tensor_names(saved))
    assert_equal(loaded, {"weights": {"here": torch.ones(3)}, "step": 4})
    assert own["weights"]["here"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match=r"missing: weights\.new"):
        load_train_state(path, {"weights": {"new": torch.zeros(3)}, "step": 0}, elsewhere=tensor_names(saved))


def test_leftovers_are_removed_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000005.tmp" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "latest.tmp").write_text("step-0")
    assert latest_train_state(tmp_path) is None
    save_train_state(tmp_path, 6, {"x": 1}, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000006"]


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_train_state(tmp_path) is None
    assert latest_train_state(tmp_path / "nowhere") is None


def remove_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def truncate_data(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 10)


def empty_manifest(path: Path) -> None:
    (path / "files.json").write_bytes(b"\0" * 40)


def remove_manifest(path: Path) -> None:
    (path / "files.json").unlink()


@pytest.mark.parametrize("damage", [remove_metadata, truncate_data, empty_manifest, remove_manifest])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    paths = [save_train_state(tmp_path, step, state_at(step), keep_last=5) for step in (1, 2, 3)]
    damage(paths[2])
    with caplog.at_level(logging.WARNING):
        assert latest_train_state(tmp_path) == paths[1]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert str(paths[2]) in warning
    assert f"going on from {paths[1]}" in warning
    with pytest.raises(CheckpointError, match=r"step-00000003: not a whole checkpoint"):
        load_train_state(paths[2], state_at(0))
    assert_equal(load_train_state(paths[1], state_at(0)), state_at(2))

    # and it is the first to go, not a whole one
    save_train_state(tmp_path, 4, state_at(4), keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002", "step-00000004"]


def test_only_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remove_metadata(save_train_state(tmp_path, 1, {"x": 1}, keep_last=1))
    with caplog.at_level(logging.WARNING):
        assert latest_train_state(tmp_path) is None
    assert "no other is left" in caplog.text


def test_a_lost_pointer_is_not_a_lost_run(tmp_path: Path) -> None:
    paths = [save_train_state(tmp_path, step, {"x": 1}, keep_last=5) for step in (1, 2)]
    (tmp_path / "latest").write_bytes(b"\xff\0")
    assert latest_train_state(tmp_path) == paths[1]
    (tmp_path / "latest").unlink()
    assert latest_train_state(tmp_path) == paths[1]


def test_bits_that_changed_on_the_disk(tmp_path: Path) -> None:
    path = save_train_state(tmp_path, 1, state_at(1), keep_last=1)
    for name in ("__0_0.distcp", ".metadata"):
        original = (path / name).read_bytes()
        (path / name).write_bytes(b"\0" * len(original))
        with pytest.raises(CheckpointError, match=r"step-00000001: cannot be read \(.*\); use an earlier checkpoint"):
            load_train_state(path, state_at(0))
        (path / name).write_bytes(original)


def without(state: dict[str, Any], block: str, name: str) -> dict[str, Any]:
    return {**state, block: {key: value for key, value in state[block].items() if key != name}}


def test_another_form_of_state_is_refused_untouched(tmp_path: Path) -> None:
    path = save_train_state(tmp_path, 9, state_at(9), keep_last=1)
    now = state_at(1)
    weights = now["weights"]
    cases = {
        r"has the entries step, .*, expected step": {key: now[key] for key in now if key != "schedule"},
        r"missing: none; unexpected: weights\.norm": without(now, "weights", "norm"),
        r"missing: weights\.extra; unexpected: none": {**now, "weights": {**weights, "extra": torch.ones(1)}},
        r"weights\.norm is torch\.bfloat16 \(5,\), expected torch\.bfloat16 \(6,\)": {
            **now,
            "weights": {**weights, "norm": torch.zeros(6).bfloat16()},
        },
        r"weights\.norm is torch\.bfloat16 \(5,\), expected torch\.float32 \(5,\)": {
            **now,
            "weights": {**weights, "norm": torch.zeros(5)},
        },
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load_train_state(path, state)
    assert_equal(now, state_at(1))


def test_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^a\.b: a list with tensors"):
        save_train_state(tmp_path, 1, {"a": {"b": [torch.ones(1)]}}, keep_last=1)
    with pytest.raises(ValueError, match=r"a\.b: two tensors"):
        save_train_state(tmp_path, 1, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, keep_last=1)
    for step, keep_last in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"step must be >= 0 and keep_last >= 1"):
            save_train_state(tmp_path, step, {}, keep_last=keep_last)
    assert os.listdir(tmp_path) == []


class Interrupt:
    """Presses Ctrl-C while it is being saved."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise KeyboardInterrupt


def test_an_interrupt_stays_one(tmp_path: Path) -> None:
    path = save_train_state(tmp_path, 1, {"x": 1}, keep_last=2)
    with pytest.raises(KeyboardInterrupt):
        save_train_state(tmp_path, 2, {"x": Interrupt()}, keep_last=2)
    assert latest_train_state(tmp_path) == path
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \((Not a directory|File exists)\); free some space"):
        save_train_state(tmp_path / "file", 1, {"x": 1}, keep_last=1)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    path = save_train_state(tmp_path, 1, state_at(1), keep_last=1)
    message = r"step-00000002: cannot be written \(File too large\); free some space .* before, which is intact"
    with full_disk(max_file_bytes=100_000), pytest.raises(CheckpointError, match=message):
        save_train_state(tmp_path, 2, {"x": torch.ones(100_000)}, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert latest_train_state(tmp_path) == path
    assert_equal(load_train_state(path, state_at(0)), state_at(1))


# Per line of stdin, a child saves step after step and is killed at the given delay after its third save began.
KILL = """
import os, signal, sys, time, torch
from pathlib import Path
from ostro.checkpoint.train_state import save_train_state

def save(step):
    state = {"step": step, "x": torch.full((2_000_000,), float(step))}
    save_train_state(Path(sys.argv[1]), step, state, keep_last=2)

for line in sys.stdin:
    first, delay = line.split()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(int(first), 10**6):
            os.write(writer, b".")
            save(step)
    os.close(writer)
    for _ in range(3):
        os.read(reader, 1)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(int(first) + 2, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL, str(tmp_path)]
    next_step, num_torn = 1, 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for delay in (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05):
            print(next_step, delay, file=process.stdin, flush=True)
            killed_in = int(process.stdout.readline())
            num_torn += any(tmp_path.glob("*.tmp"))
            path = latest_train_state(tmp_path)
            assert path is not None
            x = torch.zeros(2_000_000)
            loaded = load_train_state(path, {"step": 0, "x": x})
            assert loaded["step"] >= killed_in - 1
            assert (x == loaded["step"]).all()
            next_step = loaded["step"] + 1
        process.stdin.close()
    assert num_torn > 0, "no kill came in the middle of a save"

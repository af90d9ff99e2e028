"""Bad input as users meet it: the exit code, one line that begins with what is at fault, and nothing lost.

After each failure of a running `ostro train`, a checkpoint loads, and the same command ends where a run without the
failure ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from ostro.checkpoint.train_state import latest_train_state
from ostro.cli import main
from ostro.inference.encoder import Encoder
from ostro.models.tokenizer import cut_tekken
from ostro.train.embed import EmbedTrainer
from tests.cli.conftest import Command, Outcome
from tests.helpers.disk import full_disk
from tests.helpers.exported import edit
from tests.helpers.runs import make_inputs, recipe
from tests.unit.data.files import write_jsonl

NUM_STEPS = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, a BEIR folder, and `pairs.jsonl` with the same queries inline."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    rows = [{"query": f"who owns the {number} ships", "pos_doc": f"ships, {number}"} for number in range(40)]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture
def data(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the BEIR folder, to be spoilt."""
    return Path(shutil.copytree(inputs / "data", tmp_path / "data"))


@pytest.fixture
def weights_copy(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the weights, to be spoilt."""
    return Path(shutil.copytree(inputs / "weights", tmp_path / "weights"))


def write_recipe(inputs: Path, folder: Path) -> Path:
    """`folder/recipe.yaml`: a run of `NUM_STEPS` steps without evaluation, in `folder/run`."""
    lengths = {"num_steps": NUM_STEPS, "evaluate_every": None, "save_every": 2}
    settings = recipe(inputs, folder / "run", train=lengths).model_dump(mode="json")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**settings, "evaluate": None, "test": None}), encoding="utf-8")
    return file


@pytest.fixture
def recipe_file(inputs: Path, tmp_path: Path) -> Path:
    """The recipe, whose keys the cases override."""
    return write_recipe(inputs, tmp_path)


def losses(run: Path) -> list[float]:
    """Loss of each step in the run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows]


def failed(outcome: Outcome, code: int, message: str) -> str:
    """The last line of stderr, checked to be the error and to begin so."""
    line = outcome.err.splitlines()[-1]
    assert line.startswith(f"error: {message}"), outcome.err
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    return line


def set_line(file: Path, number: int, line: bytes) -> None:
    """Replaces a line of a file, from 1."""
    lines = file.read_bytes().splitlines()
    lines[number - 1] = line
    file.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("corpus.jsonl", 5, b'{"_id": "d4", ', "corpus.jsonl:5: not JSON"),
        ("corpus.jsonl", 5, b'{"_id": "d4", "text": "\xff"}', "corpus.jsonl:5: not UTF-8"),
        ("queries.jsonl", 2, b'{"_id": "q0-1"}', "queries.jsonl:2: no text"),
        ("queries.jsonl", 2, b'{"_id": "q0-1", "text": "  "}', "queries.jsonl:2: empty text"),
        ("corpus.jsonl", 5, b'{"text": "no id"}', "corpus.jsonl:5: no id"),
        ("corpus.jsonl", 5, b'{"_id": "d0", "text": "twice"}', "corpus.jsonl:5: id 'd0' is already that of"),
        ("qrels/train.tsv", 4, b"q1-0\td99\t1", "qrels/train.tsv:4: unknown document id 'd99'"),
        ("qrels/train.tsv", 4, b"q99\td1\t1", "qrels/train.tsv:4: unknown query id 'q99'"),
        (
            "qrels/train.tsv",
            4,
            b"q0-2\td0\t0",
            "qrels/train.tsv: 1 queries without a positive (no grade above 0): q0-2",
        ),
    ],
)
def test_a_wrong_row_of_a_beir_folder_ends_the_run_before_it_starts(
    ostro: Command, recipe_file: Path, data: Path, file: str, number: int, line: bytes, message: str
) -> None:
    set_line(data / file, number, line)
    outcome = ostro("train", recipe_file, f"data.train.0.path={data}")
    failed(outcome, 1, f"{data}/{message}")
    failed(ostro("evaluate", "unread", "--data", data, "--split", "train"), 1, f"{data}/{message}")


def test_a_recipe_may_be_mended_until_there_is_a_checkpoint(
    ostro: Command, recipe_file: Path, inputs: Path, tmp_path: Path
) -> None:
    refused = ostro("train", recipe_file, "data.train.0.split=dev")
    failed(refused, 1, f"{inputs}/data/qrels/dev.tsv: no such file; splits of this folder: test, train")
    assert ostro("train", recipe_file, "train.num_steps=1").code == 0
    refused = ostro("train", recipe_file, "train.num_steps=2")
    failed(refused, 2, f"output: {tmp_path}/run holds a run of another recipe (train.num_steps: 1 -> 2)")


def test_fewer_documents_than_k(ostro: Command, recipe_file: Path, inputs: Path) -> None:
    held_out = f"test={{path: {inputs}/data, split: test, ks: [5, 12], bm25: false}}"
    failed(ostro("train", recipe_file, held_out), 2, "ks: data/test has 11 documents, fewer than k = 12")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps=many", 'train.num_steps: must be an integer, got "many"'),
        ("loss.symmetric=1", "loss.symmetric: must be true or false, got 1"),
        ("data.train=3", "data.train: must be a list, got 3"),
        ("data.prompts.query=3", "data.prompts.query: must be text, got 3"),
        ("schedule=cosine", 'schedule: must be a block with keys, got "cosine"'),
    ],
)
def test_a_wrong_type_in_a_recipe(ostro: Command, recipe_file: Path, override: str, message: str) -> None:
    failed(ostro("train", recipe_file, override), 2, message)
    assert not (recipe_file.parent / "run").exists()


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def overwritten(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")


def larger_tokenizer(folder: Path) -> None:
    cut_tekken(2000, folder)


@pytest.mark.parametrize(
    ("spoil", "at_fault", "message"),
    [
        (truncated, "/model.safetensors", "has .* bytes, its header promises .*; download it again"),
        (overwritten, "/model.safetensors", "not a safetensors file .*|has .* bytes, its header promises .*"),
        (larger_tokenizer, "", "has 2000 entries, but the model's vocab_size is 1500; use the tokenizer .*"),
    ],
)
def test_weights_that_cannot_be_used(
    ostro: Command, recipe_file: Path, weights_copy: Path, spoil: Callable[[Path], None], at_fault: str, message: str
) -> None:
    spoil(weights_copy)
    subject = f"{weights_copy}{at_fault}" if at_fault else "tokenizer"
    for words in (["train", recipe_file, f"model.weights={weights_copy}"], ["encode", weights_copy]):
        line = failed(ostro(*words, stdin=b"text\n"), 1, subject)
        assert re.fullmatch(f"error: {subject}: ({message})", line)


def test_a_text_only_folder_where_a_part_was_asked_for(ostro: Command, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text-only"
    assert ostro("init", folder, "--layout", "text-only", "--vocab-size", "1500").code == 0
    words = ["train", recipe_file, f"model.weights={folder}", "model.extract_submodel=language_model"]
    failed(ostro(*words), 1, f"{folder}: is text-only (model_type 'ministral3') and has no part 'language_model'")


def test_a_pooling_that_does_not_exist(ostro: Command, weights_copy: Path) -> None:
    edit(weights_copy / "config.json", lambda config: config["text_config"].update(pooling="max"))
    failed(ostro("encode", weights_copy, stdin=b"text\n"), 1, f"{weights_copy}: config.json: pooling: must be one of")


@pytest.mark.parametrize("name", ["{0}/wieghts", "wieghts", "inputs/wieghts", "./wieghts"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    ostro: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", "inputs"):
        (tmp_path / folder / "weights").mkdir(parents=True)
    name = name.format(tmp_path)
    nearest = Path(name).with_name("weights")
    started = time.monotonic()
    outcome = ostro("train", recipe_file, f"model.weights={name}")
    failed(outcome, 1, f"{Path(name)}: no such folder (nearest: {nearest}); give a weights folder or a hub id")
    outcome = ostro("train", recipe_file, f"data.train.0.path={name}")
    failed(outcome, 1, f"data.train.0.path: no such file or folder: {name}; give one, or a hub name owner/name")
    assert time.monotonic() - started < 10  # a hub that cannot be reached takes 30 s


def test_a_name_that_may_be_of_the_hub_is_said_to_be_taken_so(
    ostro: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "weights").mkdir()
    outcome = ostro("train", recipe_file, "model.weights=wieghts/tiny")
    assert outcome.err.startswith("wieghts/tiny: no such folder here (nearest: weights); taken as a hub id\n")
    failed(outcome, 1, "wieghts/tiny: no config.json can be read there or on the hub")


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run without a failure."""
    folder = tmp_path_factory.mktemp("whole")
    file = write_recipe(inputs, folder)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(file)])
    assert stop.value.code == 0
    return losses(folder / "run")


def saved_step(run: Path) -> int:
    """Step of the checkpoint that the run would go on from."""
    path = latest_train_state(run / "checkpoints")
    assert path is not None
    return int(path.name.removeprefix("step-"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_that_then_goes_on(
    ostro: Command, recipe_file: Path, tmp_path: Path, whole: list[float], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("ostro")), "train", str(recipe_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not ((run / "metrics.jsonl").is_file() and losses(run)):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    step = saved_step(run)
    assert 0 < step < NUM_STEPS
    expected = f"received {number.name}. Stopped after step {step} of {NUM_STEPS} and saved {run}/checkpoints/step-"
    line = failed(Outcome(process.returncode, out, err), 128 + number, expected)
    assert line.endswith("; run the same command again to go on")
    assert ostro("train", recipe_file).code == 0
    assert losses(run) == whole


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Has something happen to this process between two steps of a real run."""
    original = EmbedTrainer.train_step

    def train_step(trainer: EmbedTrainer) -> dict[str, float]:
        if trainer.step == step:
            act()
        return original(trainer)

    monkeypatch.setattr(EmbedTrainer, "train_step", train_step)


def test_a_search_that_does_not_fit_the_memory(
    ostro: Command, inputs: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode_query", lambda encoder, texts: torch.empty(2**60))
    told = failed(ostro("evaluate", inputs / "weights", "--data", data), 1, "memory ran out (")
    assert "4611686018427387904 bytes" in told


def test_a_second_ctrl_c_stops_at_once(
    ostro: Command, recipe_file: Path, tmp_path: Path, whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        # two signals at once are one to Python: the second is sent when the first was answered
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)  # where the interrupt arrives at the latest

    # a shell starts background jobs with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        at_step(patch, 5, press_twice)
        outcome = ostro("train", recipe_file)
    failed(outcome, 130, f"{tmp_path}/run: interrupted; run the same command again to go on from its last checkpoint")
    assert saved_step(tmp_path / "run") == 4
    assert ostro("train", recipe_file).code == 0
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(
    ostro: Command,
    recipe_file: Path,
    tmp_path: Path,
    whole: list[float],
    monkeypatch: pytest.MonkeyPatch,
    in_background: bool,
) -> None:
    run = tmp_path / "run"
    with ExitStack() as stack, monkeypatch.context() as patch:
        at_step(patch, 5, lambda: stack.enter_context(full_disk(max_file_bytes=100_000)))
        outcome = ostro("train", recipe_file, f"train.async_save={str(in_background).lower()}")
    step = saved_step(run)
    # that of step 4 may still be written in the background when the disk is full
    assert step in ((2, 4) if in_background else (4,))
    told = f"{run}/checkpoints/step-{step + 2:08d}: cannot be written (File too large); free some space"
    assert failed(outcome, 1, told).endswith("the run goes on from the checkpoint before, which is intact")
    assert outcome.err.count("cannot be written") == 1
    assert ostro("train", recipe_file).code == 0
    assert losses(run) == whole


def test_a_damaged_checkpoint_is_passed_over(
    ostro: Command, recipe_file: Path, tmp_path: Path, whole: list[float]
) -> None:
    run = tmp_path / "run"
    assert ostro("train", recipe_file).code == 0
    newest = latest_train_state(run / "checkpoints")
    assert newest is not None
    os.truncate(max(newest.iterdir(), key=lambda file: file.stat().st_size), 1000)
    outcome = ostro("train", recipe_file)
    assert outcome.code == 0
    assert f"passed over damaged checkpoints: {newest}" in outcome.err
    assert f"continuing after step {NUM_STEPS - 2} of {NUM_STEPS}" in outcome.out
    assert losses(run) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "who owns the ships", "pos_doc": ""}', "empty text"),
        (b'{"query": "who owns the ships"}', "query without positive"),
        (b'{"question_id": "7", "pos_doc": "ships"}', "no query: expected a column query or question or anchor"),
        (b'{"query": "who owns \xe9", "pos_doc": "ships"}', "not UTF-8"),
        (b'{"query": "who owns', "not JSON"),
    ],
)
def test_a_wrong_inline_row_ends_the_run_with_a_checkpoint(
    ostro: Command, recipe_file: Path, inputs: Path, tmp_path: Path, line: bytes, message: str
) -> None:
    pairs = Path(shutil.copy(inputs / "pairs.jsonl", tmp_path / "pairs.jsonl"))
    right = pairs.read_bytes().splitlines()[20]
    set_line(pairs, 21, line)
    words = ["train", recipe_file, f"data.train=[{{path: {pairs}}}]", "data.shuffle=false", "train.num_steps=4"]
    told = failed(ostro(*words), 1, f"{pairs}:21: {message}")
    saved = f"{tmp_path}/run/checkpoints/step-00000002"
    assert f". Stopped after step 2 of 4 and saved {saved}; mend the row in place" in told
    set_line(pairs, 21, right)
    assert f"{saved}: continuing after step 2 of 4" in ostro(*words).out
    assert len(losses(tmp_path / "run")) == 4

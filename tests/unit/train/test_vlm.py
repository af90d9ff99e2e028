"""The vision-language run as a whole: it learns, resumes exactly, freezes what it is told, and exports what it came
from."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import Mistral3ForConditionalGeneration

from ostro.checkpoint.files import read_headers
from ostro.errors import CheckpointError, DataError, OstroError, RecipeError
from ostro.inference.chat import Chat
from ostro.train import runtime, vlm
from ostro.train.export_run import export_checkpoint
from ostro.train.parts import part_of
from tests.helpers.vlm_runs import make_inputs, picture_row, recipe
from tests.unit.data.files import write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm-inputs")
    make_inputs(folder)
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    original = vlm.VlmTrainer.train_step

    def train_step(trainer: vlm.VlmTrainer) -> dict[str, float]:
        row = original(trainer)
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(vlm.VlmTrainer, "train_step", train_step)


def test_a_run_learns_and_leaves_everything(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", train={"num_steps": 40, "evaluate_every": 20, "save_every": None})
    result = vlm.run(run, console=quiet())
    assert result.metrics["exact match"] == 1.0
    assert set(result.metrics) == {"exact match", "red", "green", "blue"}
    assert result.baselines["untrained"]["exact match"] == 0.0
    assert result.baselines["question only"]["exact match"] == pytest.approx(1 / 3)
    evaluations = [row["evaluation"] for row in rows(result.folder) if "evaluation" in row]
    assert [evaluation["exact match"] for evaluation in evaluations] == [0.0, 1.0, 1.0]
    assert evaluations[-1]["loss"] < 0.2 * evaluations[0]["loss"]
    trained = [row for row in rows(result.folder) if "mfu" in row]
    assert all(0 < row["mfu"] < 1 and row["num_images"] > 0 for row in trained)
    left = {path.name for path in result.folder.iterdir()}
    assert left >= {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "weights", "report.html", "test"}
    page = (result.folder / "report.html").read_text()
    assert page.count('<img alt="" src="data:image/png;base64,') == 9
    assert "Which colour?" in page
    answers = [json.loads(line) for line in (result.folder / "test" / "answers.jsonl").read_text().splitlines()]
    assert all(answer["correct"] and answer["answer"] == answer["reference"] for answer in answers)
    conversation = vlm.open_conversations(run.data.train)[0]
    chat = Chat.from_pretrained(result.weights)
    asked = next(item for item in conversation if item.messages[0].images)
    assert chat.answer([asked.messages[:1]]) == [asked.messages[1].text]


def test_interrupted_and_resumed_equals_uninterrupted(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = recipe(inputs, tmp_path / "whole"), recipe(inputs, tmp_path / "parts")
    vlm.run(whole, console=quiet())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(runtime.Stopped, match=r"^received SIGTERM. Stopped after step 3 of 6 and saved .*00003"):
            vlm.run(parts, console=quiet())
    assert parts.test is not None
    fewer = parts.test.model_copy(update={"batch_samples": 2})  # how answers are made, not what they are
    vlm.run(parts.model_copy(update={"test": fewer}), console=quiet())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert same_bytes(tensor, other[key]), key


def test_going_on_reads_the_frozen_weights_alone(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(inputs / "weights", tmp_path / "weights")
    frozen = {"freeze": ["vision"]}
    whole = recipe(inputs, tmp_path / "whole", model=frozen)
    parts = recipe(inputs, tmp_path / "parts", model={**frozen, "weights": str(tmp_path / "weights")})
    vlm.run(whole, console=quiet())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(runtime.Stopped):
            vlm.run(parts, console=quiet())
    for tensor in read_headers(tmp_path / "weights"):
        if "vision" not in tensor.key and "scale" not in tensor.key:
            with tensor.file.open("r+b") as file:  # nan in every type, which the reader refuses
                file.seek(tensor.begin)
                file.write(b"\xff" * tensor.num_bytes)
    with pytest.raises(CheckpointError, match=r"not finite|nan"):
        vlm.build_model(parts)
    vlm.run(parts, console=quiet())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_micro_batches_change_no_result(inputs: Path, tmp_path: Path) -> None:
    def first_step(tokens: int) -> tuple[float, float]:
        run = recipe(inputs, tmp_path / str(tokens), data={"micro_batch_tokens": tokens}, model={"dtype": "float32"})
        model, encoder = vlm.build_model(run)
        with vlm.open_loader(run, encoder) as loader:
            row = vlm.VlmTrainer(run, model, loader).train_step()
        return row["loss"], row["grad_norm"]

    # float32: sums of gradients are taken in another order
    assert first_step(4096) == pytest.approx(first_step(64), rel=1e-5)


def test_a_frozen_part_comes_back_byte_for_byte(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", model={"freeze": ["language_model", "embeddings"]}, train={"num_steps": 2})
    result = vlm.run(run, console=quiet())
    source, exported = (load_file(path / "model.safetensors") for path in (inputs / "weights", result.weights))
    assert source.keys() == exported.keys()
    moved = {key for key in source if not same_bytes(source[key], exported[key])}
    assert moved
    assert all(key.startswith(("vision_tower.", "multi_modal_projector.")) for key in moved)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in exported.values())


def test_a_part_can_have_its_own_learning_rate(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", optimizer={"part_learning_rates": {"vision": 1e-30}})
    model, encoder = vlm.build_model(run)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with vlm.open_loader(run, encoder) as loader:
        vlm.VlmTrainer(run, model, loader).train_step()
    moved = {part_of(name) for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"projector", "embeddings", "language_model"}


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_checkpoint_is_exported_as_the_run_would_have(
    precision: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(inputs, tmp_path / "run", train={"num_steps": 2}, export={"precision": precision})
    result = vlm.run(run, console=quiet())
    assert export_checkpoint(tmp_path / "run", tmp_path / "again", precision=precision) == 2
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        result.weights / "model.safetensors"
    ).read_bytes()
    model, info = Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info.values())
    ours, _ = vlm.build_model(
        run.model_copy(update={"model": run.model.model_copy(update={"weights": str(tmp_path / "again")})})
    )
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


def test_activation_checkpointing_changes_no_number(inputs: Path, tmp_path: Path) -> None:
    for on in (False, True):
        run = recipe(inputs, tmp_path / str(on), model={"activation_checkpointing": on}, train={"num_steps": 2})
        vlm.run(run, console=quiet())
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_wrong_row_in_mid_run_leaves_a_checkpoint(inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    written = [picture_row(data, number, "red") for number in range(16)]
    written[12]["messages"] = written[12]["messages"][:1]
    write_jsonl(data / "train.jsonl", written)
    run = recipe(inputs, tmp_path / "run", data={"train": [{"path": str(data / "train.jsonl")}], "shuffle": False})
    with pytest.raises(
        OstroError, match=r"train.jsonl:13: ends with the turn of role user; .*Stopped after step 1 of 6 and saved"
    ):
        vlm.run(run, console=quiet())
    written[12] = picture_row(data, 12, "red")
    write_jsonl(data / "train.jsonl", written)
    vlm.run(run, console=quiet())
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ({"model": {"freeze": ["head"]}}, RecipeError, r"^model.freeze: the model has no part head of its own"),
        ({"test": {"path": "nothing.jsonl"}}, DataError, r"^test.path: no such file or folder: nothing.jsonl"),
        ({"data": {"train": [{"path": "nothing.jsonl"}]}}, DataError, r"^data.train.0.path: no such file or folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    blocks: dict[str, Any], error: type[Exception], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        vlm.run(recipe(inputs, tmp_path / "run", **blocks), console=quiet())

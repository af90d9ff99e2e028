"""The embedding run as a whole: it learns, resumes exactly, stops cleanly, and refuses what it cannot honour."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ostro.checkpoint.train_state import latest_train_state
from ostro.errors import OstroError, RecipeError
from ostro.inference.encoder import Encoder
from ostro.train import embed, runtime
from ostro.train.trainer import find_checkpoint
from tests.helpers.runs import make_inputs, recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def exported(folder: Path) -> torch.Tensor:
    return Encoder.from_pretrained(folder / "weights").encode(["a castle", "the violin", "who owns this river"])


class StopAfter:
    """Sends this process a signal once the trainer has done some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
        original = embed.EmbedTrainer.train_step

        def train_step(trainer: embed.EmbedTrainer) -> dict[str, float]:
            row = original(trainer)
            if trainer.step == steps:
                os.kill(os.getpid(), number)
            return row

        monkeypatch.setattr(embed.EmbedTrainer, "train_step", train_step)


def test_a_run_learns_and_leaves_everything(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", train={"num_steps": 30, "evaluate_every": 15, "save_every": None})
    result = embed.run(run, console=quiet())
    assert result.metrics["nDCG@5"] > result.baselines["untrained"]["nDCG@5"] + 0.1
    assert losses(result.folder)[-1] < 0.5 * losses(result.folder)[0]
    left = {path.name for path in result.folder.iterdir()}
    assert left >= {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "weights", "report.html"}
    encoder = Encoder.from_pretrained(result.weights)
    scores = encoder.similarity(encoder.encode_query(["tell me about a castle"]), encoder.encode_document(["castle"]))
    assert scores.item() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_interrupted_and_resumed_equals_uninterrupted(
    dtype: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: dict[str, Any] = {"model": {"dtype": dtype}, "loss": {"learned_temperature": True, "temperature": 0.1}}
    whole = recipe(inputs, tmp_path / "whole", **blocks)
    embed.run(whole, console=quiet())
    parts = recipe(inputs, tmp_path / "parts", **blocks)
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(
            runtime.Stopped, match=r"^received SIGTERM. Stopped after step 3 of 6 and saved .*step-00000003"
        ):
            embed.run(parts, console=quiet())
    embed.run(parts, console=quiet())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(exported(tmp_path / "parts"), exported(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_the_shells_exit_code(
    number: signal.Signals, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    StopAfter(monkeypatch, 1, number)
    with pytest.raises(runtime.Stopped) as stopped:
        embed.run(recipe(inputs, tmp_path / "run"), console=quiet())
    assert stopped.value.exit_code == 128 + number
    assert latest_train_state(tmp_path / "run" / "checkpoints") is not None
    assert signal.getsignal(number) is before


def test_going_on_does_not_read_the_first_weights(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(inputs / "weights", tmp_path / "weights")
    blocks: dict[str, Any] = {"model": {"weights": str(tmp_path / "weights")}}
    embed.run(recipe(inputs, tmp_path / "whole"), console=quiet())
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(runtime.Stopped):
            embed.run(recipe(inputs, tmp_path / "parts", **blocks), console=quiet())
    for file in (tmp_path / "weights").glob("*.safetensors"):
        file.unlink()
    embed.run(recipe(inputs, tmp_path / "parts", **blocks), console=quiet())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(exported(tmp_path / "parts"), exported(tmp_path / "whole"))


def test_a_finished_run_is_not_trained_again(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run")
    first = embed.run(run, console=quiet())
    rows = (first.folder / "metrics.jsonl").read_text()
    again = embed.run(run, console=quiet())
    assert again.metrics == first.metrics
    assert (first.folder / "metrics.jsonl").read_text() == rows


def test_the_best_checkpoint_is_kept(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1: 0.2, 2: 0.7, 3: 0.5, 4: 0.7, 5: 0.6, 6: 0.1}
    monkeypatch.setattr(
        embed.embed_result, "evaluate_during", lambda options, encoder, judges, step, *rest: scores[step]
    )
    lengths = {"evaluate_every": 1, "save_every": 3, "keep_last": 1, "keep_best": True}
    run = recipe(inputs, tmp_path / "run", train=lengths)
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        with pytest.raises(runtime.Stopped):
            embed.run(run, console=quiet())
    embed.run(run, console=quiet())
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["latest", "step-00000002", "step-00000006"]


def test_another_recipe_in_the_same_output_is_refused(inputs: Path, tmp_path: Path) -> None:
    embed.run(recipe(inputs, tmp_path / "run", train={"num_steps": 1}), console=quiet())
    with pytest.raises(RecipeError, match=r"output: .*another recipe \(train.num_steps: 1 -> 2\)"):
        embed.run(recipe(inputs, tmp_path / "run", train={"num_steps": 2}), console=quiet())


def test_a_stop_in_the_last_step_leaves_the_export_to_the_next_call(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(inputs, tmp_path / "run", train={"num_steps": 2})
    with monkeypatch.context() as patch:
        StopAfter(patch, 2)
        with pytest.raises(runtime.Stopped, match="after step 2 of 2"):
            embed.run(run, console=quiet())
    assert not (tmp_path / "run" / "weights").exists()
    assert embed.run(run, console=quiet()).weights.is_dir()


def test_keys_that_change_no_result_may_change_when_a_run_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        StopAfter(patch, 2)
        with pytest.raises(runtime.Stopped):
            embed.run(recipe(inputs, tmp_path / "run"), console=quiet())
    other = recipe(inputs, tmp_path / "run", data={"micro_batch_tokens": 500}, train={"save_every": 3, "log_every": 2})
    embed.run(other, console=quiet())
    assert exported(tmp_path / "run").shape == (3, 192)


def device_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore text")


def host_is_full() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(("fill", "told"), [(device_is_full, "2 GiB."), (host_is_full, "4611686018427387904 bytes")])
def test_running_out_of_memory_leaves_a_checkpoint_and_names_the_key(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[], None], told: str
) -> None:
    original = embed.EmbedTrainer._backward

    def backward(trainer: embed.EmbedTrainer, batch: Any) -> Any:
        if trainer.step == 1:
            fill()
        return original(trainer, batch)

    monkeypatch.setattr(embed.EmbedTrainer, "_backward", backward)
    with pytest.raises(
        OstroError, match=r"^data.micro_batch_tokens: too large .*lower it. Stopped after step 1"
    ) as caught:
        embed.run(recipe(inputs, tmp_path / "run"), console=quiet())
    assert told in str(caught.value)
    assert latest_train_state(tmp_path / "run" / "checkpoints") is not None


def test_a_non_finite_loss_leaves_the_last_good_state(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: dict[str, Any] = {"train": {"accumulation_steps": 2}}
    embed.run(recipe(inputs, tmp_path / "whole", **blocks), console=quiet())
    original = embed.EmbedTrainer.train_step

    def train_step(trainer: embed.EmbedTrainer) -> dict[str, float]:
        if trainer.step == 2:
            next(trainer._embedder.parameters()).data.fill_(float("nan"))
        return original(trainer)

    monkeypatch.setattr(embed.EmbedTrainer, "train_step", train_step)
    run = recipe(inputs, tmp_path / "run", **blocks)
    with pytest.raises(OstroError, match=r"^loss: is nan; .*Stopped after step 2 of 6 and saved .*step-00000002"):
        embed.run(run, console=quiet())
    monkeypatch.undo()
    embed.run(run, console=quiet())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_evaluation_that_fails_loses_no_step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "data"
    shutil.copytree(inputs / "data", copied)
    original = embed.EmbedTrainer.train_step

    def train_step(trainer: embed.EmbedTrainer) -> dict[str, float]:
        if trainer.step == 2:
            (copied / "qrels" / "test.tsv").unlink()
        return original(trainer)

    monkeypatch.setattr(embed.EmbedTrainer, "train_step", train_step)
    run = recipe(inputs, tmp_path / "run", evaluate={"path": str(copied)}, train={"save_every": None})
    with pytest.raises(OstroError, match=r"^.*test\.tsv: no such file.*Stopped after step 3 of 6 and saved"):
        embed.run(run, console=quiet())
    shutil.copy(inputs / "data" / "qrels" / "test.tsv", copied / "qrels" / "test.tsv")
    monkeypatch.undo()
    embed.run(run, console=quiet())
    assert len(losses(tmp_path / "run")) == 6


def test_the_checkpoint_holds_every_field_of_the_state(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", loss={"learned_temperature": True})
    embedder, tokenizer = embed.build_embedder(run)
    with embed.open_loader(run, tokenizer) as loader:
        trainer = embed.EmbedTrainer(run, embedder, loader)
        trainer.train_step()
        trainer.save(tmp_path)
        trainer.finish_saving()
        state = trainer.state()
        assert {field.name for field in fields(state)} == set(vars(state))
        trained = {name for name, weight in embedder.named_parameters() if weight.requires_grad}
        assert set(state.weights) == {*trained, "log_temperature"}
        assert set(state.optimizer) == set(state.weights)
        embedder, tokenizer = embed.build_embedder(run)
    with embed.open_loader(run, tokenizer) as loader:
        fresh = embed.EmbedTrainer(run, embedder, loader)
        fresh.resume(find_checkpoint(tmp_path, fresh.ranks), quiet())
        assert (fresh.step, fresh.num_tokens) == (1, trainer.num_tokens)
        assert fresh.state().loader == state.loader
        for name, weight in state.weights.items():
            assert torch.equal(fresh.state().weights[name], weight)
            for key, value in state.optimizer[name].items():
                assert torch.equal(fresh.state().optimizer[name][key], value)


def test_accumulated_batches_weigh_equally(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", train={"accumulation_steps": 3}, model={"dtype": "float32"})
    embedder, tokenizer = embed.build_embedder(run)
    with embed.open_loader(run, tokenizer) as loader:
        trainer = embed.EmbedTrainer(run, embedder, loader)
        row = trainer.train_step()
        assert loader.state_dict()["num_samples"] == 3 * 8
    single = recipe(inputs, tmp_path / "single", model={"dtype": "float32"}, optimizer={"learning_rate": 1e-30})
    embedder, tokenizer = embed.build_embedder(single)
    with embed.open_loader(single, tokenizer) as loader:
        trainer = embed.EmbedTrainer(single, embedder, loader)
        rows = [trainer.train_step() for _ in range(3)]
    assert row["loss"] == pytest.approx(sum(one["loss"] for one in rows) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"model": {"extract_submodel": "tower"}}, r"^model\.extract_submodel: 'tower': no part 'tower'"),
        (
            {"loss": {"matryoshka_dims": [4096]}},
            r"^loss\.matryoshka_dims: must be <= the model's 192 dims, got \[4096\]",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_training(
    blocks: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        embed.run(recipe(inputs, tmp_path / "run", **blocks), console=quiet())
    mended = recipe(inputs, tmp_path / "run", train={"num_steps": 1})
    assert embed.run(mended, console=quiet()).weights.is_dir()


def test_activation_checkpointing_changes_no_number(inputs: Path, tmp_path: Path) -> None:
    plain, recomputed = (
        recipe(inputs, tmp_path / str(on), model={"activation_checkpointing": on}, train={"num_steps": 2})
        for on in (False, True)
    )
    embed.run(plain, console=quiet())
    embed.run(recomputed, console=quiet())
    assert losses(Path(recomputed.output)) == losses(Path(plain.output))


def test_a_package_needed_at_the_end_is_asked_for_at_the_start(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.machinery.ModuleSpec("found", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bm25s" else found)
    with pytest.raises(OstroError, match=r"bm25s: not installed; run: pip install 'ostro\[search\]'"):
        embed.run(recipe(inputs, tmp_path / "run", test={"bm25": True}), console=quiet())
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OstroError, match=r"file/run: cannot be written"):
        embed.run(recipe(inputs, tmp_path / "file" / "run"), console=quiet())

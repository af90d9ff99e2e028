"""Training, exporting and asking a vision-language model through the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.cli.conftest import Command
from tests.helpers.vlm_runs import make_inputs, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `recipe.yaml` for a short run in `run/`."""
    folder = tmp_path_factory.mktemp("vlm-cli")
    make_inputs(folder)
    made = recipe(folder, folder / "run", train={"num_steps": 2, "evaluate_every": None})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
    return folder


def test_train_export_and_chat(run: Path, ostro: Command) -> None:
    trained = ostro("train", run / "recipe.yaml")
    assert trained.code == 0, trained.err
    assert "exact match" in trained.out
    assert "question only" in trained.out
    assert "trains: " in trained.err
    exported = ostro("export", run / "run", "--output", run / "bf16", "--precision", "bf16")
    assert (exported.code, exported.out) == (0, f"{run / 'bf16'}: the weights after step 2\n")
    assert {str(tensor.dtype) for tensor in load_file(run / "bf16" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }
    Image.new("RGB", (60, 40), (200, 0, 0)).save(run / "photo.png")
    words = ("chat", run / "bf16", "--max-new-tokens", 3, "Which colour?")
    answered = ostro(*words[:2], "--image", run / "photo.png", *words[2:])
    assert answered.code == 0, answered.err
    assert ostro(*words).code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("chat", "weights", ""), 2, "Invalid value for QUESTION: empty; write a question"),
        (("chat", "nothing-here", "Why?"), 1, "nothing-here: no such folder"),
        (("chat", "weights", "--image", "nothing.png", "Why?"), 1, "--image: image nothing.png: no such file"),
        (("chat", "weights", "--image", "one.png", "Why?"), 1, "--image: image one.png: has 1 x 1 pixels"),
        (
            ("export", "run", "--output", "x", "--precision", "fp9"),
            2,
            "Invalid value for '--precision': Value error, 'fp9' is not one of",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: tuple[str, ...], code: int, message: str, run: Path, ostro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    Image.new("RGB", (1, 1)).save("one.png")
    outcome = ostro(*words)
    assert outcome.code == code
    assert outcome.err.splitlines()[-1].startswith(f"error: {message}"), outcome.err


def test_an_embedder_has_no_precision(ostro: Command, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(
        "{kind: embed, output: x, model: {weights: w}, data: {train: [{path: d}]}, train: {num_steps: 1}}"
    )
    step = tmp_path / "checkpoints" / "step-00000001"
    outcome = ostro("export", step, "--output", tmp_path / "out", "--precision", "fp8")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: --precision: fp8 is for vision-language models")

"""A checkpoint exports to what its run exported, and what is not a checkpoint is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ostro.errors import CheckpointError
from ostro.inference.encoder import Encoder
from ostro.train import embed
from ostro.train.export_run import export_checkpoint
from tests.helpers.runs import make_inputs, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_inputs(folder)
    settings = recipe(folder, folder / "run", train={"num_steps": 4}, loss={"learned_temperature": True})
    return embed.run(settings, console=Console(file=io.StringIO())).folder


def vectors(folder: Path) -> torch.Tensor:
    return Encoder.from_pretrained(folder).encode(["a castle", "the violin"])


def test_the_latest_checkpoint_gives_the_export_of_the_run(run: Path, tmp_path: Path) -> None:
    assert export_checkpoint(run, tmp_path / "exported") == 4
    assert torch.equal(vectors(tmp_path / "exported"), vectors(run / "weights"))


def test_an_earlier_checkpoint_gives_other_weights(run: Path, tmp_path: Path) -> None:
    assert export_checkpoint(run / "checkpoints" / "step-00000002", tmp_path / "exported") == 2
    assert not torch.allclose(vectors(tmp_path / "exported"), vectors(run / "weights"))


def test_what_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "exported")
    with pytest.raises(CheckpointError, match=r"neither a run folder .* nor a checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "exported")
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    with pytest.raises(CheckpointError, match="has no whole checkpoint yet"):
        export_checkpoint(tmp_path, tmp_path / "exported")

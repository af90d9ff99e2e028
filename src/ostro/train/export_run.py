"""Export a checkpoint of a run: the folder that the run itself would have written at that step.

Training, evaluation and the form of the folder are left to `embed`, `embed_result` and `checkpoint.export`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ostro.checkpoint.train_state import latest_train_state, load_train_state
from ostro.config import load_recipe
from ostro.errors import CheckpointError
from ostro.train.embed import build_embedder
from ostro.train.embed_result import export, run_encoder
from ostro.train.precision import MasterWeights
from ostro.train.recipe import KINDS


def export_checkpoint(path: str | Path, output: str | Path) -> int:
    """Writes the weights of a checkpoint as a folder that other libraries open, and verifies it.

    Args:
        path: A checkpoint such as `runs/first/checkpoints/step-00000400`, or a run folder for its latest one.
        output: The folder to write; an earlier export there is replaced.

    Returns:
        Optimizer steps of the exported checkpoint.

    Raises:
        CheckpointError: When there is no whole checkpoint, or the folder cannot be written or verified.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or one of its checkpoints")
    run = path if (path / "recipe.yaml").is_file() else path.parent.parent
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{path}: neither a run folder (no recipe.yaml in it) nor a checkpoint of one")
    checkpoint = latest_train_state(run / "checkpoints") if run == path else path
    if checkpoint is None:
        raise CheckpointError(f"{run}: has no whole checkpoint yet; let the run save one")
    recipe = load_recipe(run / "recipe.yaml", [], KINDS)
    embedder, tokenizer = build_embedder(recipe)
    masters = MasterWeights(embedder)
    weights: dict[str, torch.Tensor] = dict(masters.named_parameters())
    if recipe.loss.learned_temperature:
        weights["log_temperature"] = torch.zeros(())
    form = {"step": 0, "num_tokens": 0, "weights": weights, "optimizer": {}, "loader": {}, "random": {}}
    state = load_train_state(checkpoint, form)
    masters.publish()
    step = int(state["step"])
    export(recipe, run_encoder(recipe, embedder.eval(), tokenizer), Path(output), step=step, metrics={})
    return step

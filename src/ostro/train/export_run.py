"""Export a checkpoint of a run: the folder that the run itself would have written at that step.

Training, evaluation and the form of the folder are left to the loops, their results and `checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ostro.checkpoint.train_state import latest_train_state
from ostro.config import load_recipe
from ostro.errors import CheckpointError, RecipeError
from ostro.train.recipe import KINDS, EmbedRecipe, VlmRecipe
from ostro.train.trainer import load_weights


def export_checkpoint(
    path: str | Path, output: str | Path, *, precision: Literal["source", "bf16", "fp8"] | None = None
) -> int:
    """Writes the weights of a checkpoint as a folder that other libraries open, and verifies it.

    Args:
        path: A checkpoint such as `runs/first/checkpoints/step-00000400`, or a run folder for its latest one.
        output: The folder to write; an earlier export there is replaced.
        precision: Of a vision-language model; what its recipe says when None.

    Returns:
        Optimizer steps of the exported checkpoint.

    Raises:
        RecipeError: When a precision is given for an embedder.
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
    if isinstance(recipe, EmbedRecipe):
        if precision is not None:
            raise RecipeError(
                f"--precision: {precision} is for vision-language models, and {run} trained an embedder; "
                "leave it out, or set export.dtype in the recipe"
            )
        return _export_embedder(recipe, checkpoint, Path(output))
    if precision is not None:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"precision": precision})})
    return _export_vlm(recipe, checkpoint, Path(output))


def _export_embedder(recipe: EmbedRecipe, checkpoint: Path, output: Path) -> int:
    from ostro.train import embed, embed_result

    embedder, tokenizer = embed.build_embedder(recipe, is_resumed=True, device=torch.device("cpu"))
    loss_weights = {"log_temperature": torch.zeros(())} if recipe.loss.learned_temperature else {}
    step = load_weights(checkpoint, embedder, loss_weights)
    encoder = embed_result.run_encoder(recipe, embedder.eval(), tokenizer)
    embed_result.export(recipe, encoder, output, step=step, metrics={})
    return step


def _export_vlm(recipe: VlmRecipe, checkpoint: Path, output: Path) -> int:
    from ostro.train import vlm, vlm_result

    model, _ = vlm.build_model(recipe, is_resumed=True, device=torch.device("cpu"))
    step = load_weights(checkpoint, model)
    vlm_result.export(recipe, model.eval(), output, step=step)
    return step

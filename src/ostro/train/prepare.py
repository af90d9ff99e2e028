"""Inputs that a demo recipe makes for itself before the run: random weights, and real data that comes with a package.

What is already there is left alone; what is made comes out the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ostro.checkpoint.create import create_weights
from ostro.demo.attack import prepare_attack
from ostro.demo.fashion import prepare_fashion
from ostro.errors import RecipeError
from ostro.train.recipe import EmbedRecipe, VlmRecipe

_DATASETS = {
    "attack": ("the ATT&CK procedures (c) MITRE, see its NOTICE", prepare_attack),
    "fashion": ("scenes of Fashion-MNIST photos (c) Zalando SE, MIT licence", prepare_fashion),
}


def prepare_inputs(recipe: EmbedRecipe | VlmRecipe, console: Console) -> None:
    """Makes the recipe's `prepare` inputs where their folders do not exist.

    Args:
        recipe: `prepare.weights` goes to `model.weights`; `prepare.dataset` to the folder of the only training source,
            or the folder that holds its file.
        console: Says what is made.

    Raises:
        RecipeError: When the size or vocabulary asked for does not exist.
        OstroError: When a package is missing or a folder cannot be written.
    """
    weights, dataset = recipe.prepare.weights, recipe.prepare.dataset
    weights_folder, data = Path(recipe.model.weights), Path(recipe.data.train[0].path)
    if weights is not None and not weights_folder.exists():
        made = f"random {weights.precision} weights, {weights.size}, {weights.layout}"
        console.out(f"{weights_folder}: making {made}", highlight=False)
        try:
            create_weights(weights_folder, **weights.model_dump(), seed=recipe.seed)
        except RecipeError as error:
            raise RecipeError(f"prepare.weights.{error}") from error
    data_folder = data.parent if data.suffix else data
    if dataset is not None and not data_folder.exists():
        what, make = _DATASETS[dataset]
        console.out(f"{data_folder}: writing {what}", highlight=False)
        make(data_folder)

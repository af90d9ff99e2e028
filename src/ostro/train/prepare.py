"""Inputs that a demo recipe makes for itself before the first step: random weights and real data from an installed
package.

What is already there is left alone; what is made comes out the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ostro.errors import RecipeError
from ostro.train.recipe import EmbedRecipe


def prepare_inputs(recipe: EmbedRecipe, console: Console) -> None:
    """Makes the recipe's `prepare` inputs where their folders do not exist.

    Args:
        recipe: `prepare.weights` goes to `model.weights`, `prepare.dataset` to the folder of the only training source.
        console: Says what is made.

    Raises:
        RecipeError: When the size or vocabulary asked for does not exist.
        OstroError: When a package is missing or a folder cannot be written.
    """
    weights, dataset = recipe.prepare.weights, recipe.prepare.dataset
    weights_folder = Path(recipe.model.weights)
    if weights is not None and not weights_folder.exists():
        from ostro.checkpoint.create import create_weights

        console.out(
            f"{weights_folder}: making random {weights.precision} weights, {weights.size}, {weights.layout}",
            highlight=False,
        )
        try:
            create_weights(weights_folder, **weights.model_dump(), seed=recipe.seed)
        except RecipeError as error:
            raise RecipeError(f"prepare.weights.{error}") from error
    data_folder = Path(recipe.data.train[0].path)
    if dataset is not None and not data_folder.exists():
        from ostro.demo.attack import prepare_attack

        console.out(f"{data_folder}: writing the ATT&CK procedures (c) MITRE, see its NOTICE", highlight=False)
        prepare_attack(data_folder)

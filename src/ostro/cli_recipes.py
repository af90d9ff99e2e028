"""`ostro recipes`: what recipes there are, and what may stand in one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

recipes_app = typer.Typer()


@recipes_app.callback(invoke_without_command=True, epilog="Example: ostro recipes list")
def recipes(context: typer.Context) -> None:
    """List, show and describe the shipped recipes."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list", epilog="Example: ostro recipes list")
def list_recipes() -> None:
    """Names of the shipped recipes, and the first line of each."""
    from ostro.config import shipped_recipes

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, text in recipes.items():
        print(f"{name:<{width}}  {text.splitlines()[0].strip('# :')}")


@recipes_app.command("show", epilog="Example: ostro recipes show embed-demo > mine.yaml")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", show_default=False)],
) -> None:
    """Print a shipped recipe, to be copied and changed."""
    from ostro.config import read_recipe

    print(read_recipe(name)[1], end="")


@recipes_app.command("schema", epilog="Example: ostro recipes schema > ostro.schema.json")
def print_schema() -> None:
    """Print the JSON schema of recipes, for completion and checks in editors."""
    from ostro.config import json_schema
    from ostro.train.recipe import KINDS

    print(json.dumps(json_schema(KINDS), indent=2))

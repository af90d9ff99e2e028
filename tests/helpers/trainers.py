"""A trainer of either kind on the ranks that are there, laid out as its recipe says."""

from __future__ import annotations

from ostro.parallel.mesh import build_mesh
from ostro.train import embed, vlm
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from ostro.train.trainer import Trainer


def make_trainer(recipe: EmbedRecipe | VlmRecipe) -> Trainer:
    """The trainer of a recipe on CPU ranks, or in one process."""
    mesh = build_mesh(recipe.parallel, Ranks.current().world_size, "cpu")
    if isinstance(recipe, EmbedRecipe):
        embedder, tokenizer = embed.build_embedder(recipe, mesh)
        return embed.EmbedTrainer(recipe, embedder, embed.open_loader(recipe, tokenizer, mesh), mesh)
    model, encoder = vlm.build_model(recipe, mesh)
    return vlm.VlmTrainer(recipe, model, vlm.open_loader(recipe, encoder, mesh), mesh)

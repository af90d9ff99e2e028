"""The configuration of a recipe's model: from its folder, else of the release that `model.weights` names.

Weights are never looked at. The shapes of the releases are data here, so that a run can be planned before anything is
downloaded; what is no shape (rope, ids) does not decide about memory and is that of Ministral-3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, Mistral3Config, PreTrainedConfig

from ostro.checkpoint.files import is_native, read_json
from ostro.checkpoint.load import read_vlm_config
from ostro.checkpoint.presets import model_config
from ostro.errors import LayoutError, RecipeError
from ostro.models.backbone import MODEL_CLASSES
from ostro.train.recipe import EmbedRecipe, VlmRecipe

_VOCABULARY = 131_072
_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LARGE_VISION = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}

# The inner sizes of the 14B and the 24B are not from their files; with them the weights add up to the names.
RELEASES: Mapping[str, tuple[tuple[int, ...], Mapping[str, int], bool]] = MappingProxyType(
    {
        "Ministral-3-3B": ((3072, 9216, 26, 32, 8), {}, True),
        "Ministral-3-8B": ((4096, 14336, 34, 32, 8), {}, False),
        "Ministral-3-14B": ((5120, 16384, 40, 32, 8), {}, False),
        "Devstral-Small-2-24B": ((5120, 32768, 40, 32, 8), {}, False),
        "Mistral-Medium-3.5-128B": ((12288, 28672, 88, 96, 8), _LARGE_VISION, False),
    }
)
"""Shape of the text layers (hidden, intermediate, layers, heads, key-value heads), of the vision tower where it is not
that of Ministral-3, and whether the head is the embedding; by how the names of the published folders begin."""


def read_config(recipe: EmbedRecipe | VlmRecipe) -> tuple[PreTrainedConfig, str]:
    """The configuration of what a recipe trains, and where it is from.

    Args:
        recipe: Its `model.weights` is a folder with `config.json` or `params.json`, or names a release.

    Returns:
        That of the vision-language model, or of the text tower for an embedder; and a phrase for the reader.

    Raises:
        RecipeError: When `model.weights` is neither a folder nor the name of a release.
        LayoutError: When the folder has no configuration, or one of another family.
    """
    name = recipe.model.weights
    folder = Path(name)
    if folder.is_dir():
        source = f"configuration of {name}"
        config = _read_folder(folder, recipe)
    else:
        fields, source = _packaged(recipe)
        config = Mistral3Config(**{key: value for key, value in fields.items() if key != "model_type"})
    if isinstance(recipe, EmbedRecipe) and isinstance(config, Mistral3Config):
        text: Any = config.text_config
        return text, source
    return config, source


def _read_folder(folder: Path, recipe: EmbedRecipe | VlmRecipe) -> PreTrainedConfig:
    is_text = (
        not is_native(folder) and read_json(folder / "config.json").get("model_type") in MODEL_CLASSES["embedding"]
    )
    if isinstance(recipe, EmbedRecipe) and is_text:
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        except (ValueError, TypeError, KeyError) as error:
            raise LayoutError(f"{folder}: config.json: not one that transformers understands: {error}") from error
        return config
    return read_vlm_config(folder)


def _packaged(recipe: EmbedRecipe | VlmRecipe) -> tuple[dict[str, Any], str]:
    name, made = recipe.model.weights, recipe.prepare.weights
    if made is not None:
        config = model_config(made.size, vocab_size=made.vocab_size, tie_word_embeddings=made.layout == "nested")
        return config, f"preset {made.size}, of which the run makes {name}"
    for release, (text, vision, is_tied) in RELEASES.items():
        if re.match(re.escape(release) + r"(-|$)", name.rstrip("/").rpartition("/")[2], re.IGNORECASE):
            config = model_config("3b", vocab_size=_VOCABULARY, tie_word_embeddings=is_tied)
            config["text_config"] |= dict(zip(_TEXT, text, strict=True))
            config["vision_config"] |= vision
            return config, f"shape of {release} that comes with Ostro, as {name} is no folder here"
    raise RecipeError(
        f"model.weights: {name} is no folder, and no model whose shape comes with Ostro; give a folder with "
        f"config.json or params.json, or a name that begins with one of {', '.join(RELEASES)}"
    )

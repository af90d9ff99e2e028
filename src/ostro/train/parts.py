"""The named parts of a vision-language model: which of them train, and at which rate.

The idea: every parameter belongs to exactly one part by its runtime name, so freezing and learning rates need no
patterns from the user, and a part that the model does not have is an error rather than an option that does nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ostro.errors import RecipeError
from ostro.train.options import Part

logger = logging.getLogger(__name__)

_PREFIXES: tuple[tuple[str, Part], ...] = (
    ("model.vision_tower.", "vision"),
    ("model.multi_modal_projector.", "projector"),
    ("model.language_model.embed_tokens.", "embeddings"),
    ("model.language_model.", "language_model"),
    ("lm_head.", "head"),
)


PARTS: tuple[Part, ...] = tuple(part for _, part in _PREFIXES)
"""All parts, from the pixels to the next token."""


def part_of(name: str) -> Part:
    """The part that a parameter belongs to.

    Args:
        name: Runtime name, as `named_parameters` of `Mistral3ForConditionalGeneration` gives it.

    Raises:
        ValueError: When no part has such a name.
    """
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part
    raise ValueError(f"{name}: belongs to no part; they begin with {', '.join(prefix for prefix, _ in _PREFIXES)}")


def freeze(model: PreTrainedModel, parts: Sequence[Part]) -> dict[Part, int]:
    """Takes the gradient from the named parts, and logs what trains.

    Args:
        model: A vision-language model.
        parts: Parts to freeze.

    Returns:
        Trainable parameters by part, without the frozen ones.

    Raises:
        RecipeError: When a part is not in the model, or nothing is left to train.
    """
    trained: Counter[Part] = Counter()
    frozen: Counter[Part] = Counter()
    for name, weight in model.named_parameters():
        part = part_of(name)
        weight.requires_grad_(part not in parts)
        (frozen if part in parts else trained)[part] += weight.numel()
    for part in parts:
        _check_present(part, model, "model.freeze")
    if not trained:
        raise RecipeError(f"model.freeze: {', '.join(parts)} is all there is; leave a part to train")
    shown = [f"{part} {count:,}" for part, count in trained.items()]
    logger.info("trains: %s; frozen: %s", ", ".join(shown), ", ".join(frozen) or "none")
    return dict(trained)


def rate_factors(
    model: PreTrainedModel, part_learning_rates: Mapping[Part, float], learning_rate: float
) -> dict[str, float]:
    """What the learning rate of each weight is multiplied by so that its part has the peak it was given.

    Args:
        model: A vision-language model, or a stage of it.
        part_learning_rates: Peak learning rate by part.
        learning_rate: Peak of the parts that are not named, > 0.

    Returns:
        Factor by parameter name, for the weights of the named parts.

    Raises:
        RecipeError: When a part is not in the model.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in part_learning_rates:
        _check_present(part, model, f"optimizer.part_learning_rates.{part}")
    return {
        name: part_learning_rates[part_of(name)] / learning_rate
        for name in names
        if part_of(name) in part_learning_rates
    }


def _check_present(part: Part, model: PreTrainedModel, key: str) -> None:
    if part == "head" and model.config.tie_word_embeddings:
        raise RecipeError(
            f"{key}: the model has no part head of its own; the head is the embedding (tied); name embeddings instead"
        )

"""Options of the contrastive loss: the `loss` block of a recipe, checked without importing torch.

What the values mean is in `contrastive`; that each Matryoshka dim fits the model is checked where the model is known.
"""

from __future__ import annotations

import pydantic

from ostro.config import Options


class ContrastiveOptions(Options):
    """Settings of `ostro.losses.contrastive.contrastive_loss`."""

    temperature: float = pydantic.Field(default=0.02, gt=0)
    """Divides the cosine similarities. The starting value when learned."""

    learned_temperature: bool = False
    """Train the temperature together with the model."""

    symmetric: bool = False
    """Average the query-to-document loss with the document-to-query one."""

    matryoshka_dims: tuple[pydantic.PositiveInt, ...] = ()
    """Leading dims trained to work alone, largest first; the full size is always trained."""

    matryoshka_weights: tuple[pydantic.PositiveFloat, ...] = ()
    """Weight of the loss of each Matryoshka dim, 1 if empty. The full size has weight 1 unless it is listed."""

    false_negative_margin: float | None = pydantic.Field(default=None, ge=0)
    """Leave out negatives whose cosine exceeds the positive's by more than this (0.1 is usual); null keeps all."""

    @pydantic.field_validator("matryoshka_dims")
    @classmethod
    def _dims_decrease(cls, dims: tuple[int, ...]) -> tuple[int, ...]:
        if list(dims) != sorted(set(dims), reverse=True):
            raise ValueError(f"must be strictly decreasing, got {list(dims)}")
        return dims

    @pydantic.field_validator("matryoshka_weights")
    @classmethod
    def _weights_match(cls, weights: tuple[float, ...], info: pydantic.ValidationInfo) -> tuple[float, ...]:
        dims = info.data.get("matryoshka_dims", ())
        if weights and len(weights) != len(dims):
            raise ValueError(f"must have one weight per matryoshka dim ({len(dims)}) or be empty, got {list(weights)}")
        return weights

"""The pieces of an optimizer step that both loops share: learning rate, optimizer, clipping, and the guard against
non-finite numbers.

What the loss is, and what a batch is, belongs to each loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

from ostro.errors import OstroError, ToldElsewhere
from ostro.train.options import OptimizerOptions, ScheduleOptions
from ostro.train.ranks import Ranks


def learning_rate(step: int, *, num_steps: int, peak: float, options: ScheduleOptions) -> float:
    """The learning rate of one optimizer step.

    `peak * (step + 1) / warmup_steps` while warming up; then, with t going from 0 to 1 over the rest, `peak * (r + (1 -
    r) * f(t))` where r is `final_ratio` and f is `1 - t` (linear), `(1 + cos(pi t)) / 2` (cosine) or 1 (constant).

    Args:
        step: Steps already done; the first step of a run is 0.
        num_steps: Steps of the run.
        peak: Highest learning rate.
        options: Form of the schedule.

    Returns:
        The learning rate to use for this step, > 0 until the decay has ended.
    """
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(num_steps - options.warmup_steps, 1)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[options.kind]
    return peak * (options.final_ratio + (1 - options.final_ratio) * decay)


class Optimizer:
    """AdamW over named float32 weights, with its state addressed by those names.

    Names, not positions, are what a checkpoint of another split or a changed parameter order can be matched by.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        options: OptimizerOptions,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        """Builds two groups per learning rate: matrices with weight decay, everything else without.

        Args:
            weights: Trainable float32 weights by name.
            options: Hyper-parameters.
            rate_factors: What the learning rate of a weight is multiplied by, where it is not 1, by name.
        """
        self._weights = dict(weights)
        self._options = options
        by_kind: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {}
        for name, weight in self._weights.items():
            # split weights apart: a fused step takes them or plain ones, not both
            kind = ((rate_factors or {}).get(name, 1.0), weight.ndim >= 2, isinstance(weight, DTensor))
            by_kind.setdefault(kind, []).append(weight)
        self._factors = [factor for factor, _, _ in by_kind]
        groups = [
            {"params": group, "weight_decay": options.weight_decay if is_matrix else 0.0}
            for (_, is_matrix, _), group in by_kind.items()
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True
        )
        for weight in self._weights.values():
            # made here, not at the first step, so that a checkpoint can be loaded into them
            self._adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Moments and step count by weight name: the live tensors, so loading into them restores the optimizer."""
        return {name: self._adamw.state[weight] for name, weight in self._weights.items()}

    def step(self, rate: float) -> float:
        """Clips the gradients, updates the weights and clears the gradients.

        Args:
            rate: Learning rate of this step, before the factors.

        Returns:
            The gradient norm before clipping.

        Raises:
            OstroError: When the norm is not finite; the weights are untouched then.

        Distributed: one reduction of the norm where weights are split over ranks.
        """
        weights = [weight for weight in self._weights.values() if weight.grad is not None]
        kinds = [[weight for weight in weights if isinstance(weight, DTensor) == split] for split in (False, True)]
        norm = _total_norm([[weight.grad for weight in kind] for kind in kinds if kind])
        check_finite("gradient norm", norm.item())
        if self._options.max_grad_norm is not None:
            for kind in kinds:
                torch.nn.utils.clip_grads_with_norm_(kind, self._options.max_grad_norm, norm)
        for group, factor in zip(self._adamw.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)


def _total_norm(kinds: Sequence[Sequence[torch.Tensor | None]]) -> torch.Tensor:
    """The norm over all gradients, whole and split ones apart, as a plain tensor."""
    norms = [torch.nn.utils.get_total_norm([gradient for gradient in kind if gradient is not None]) for kind in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.tensor(norms))


def check_finite(name: str, value: float) -> None:
    """Stops a run whose numbers have become infinite or nan, before they reach the weights.

    Args:
        name: What it is.
        value: The same on all ranks.

    Raises:
        OstroError: When `value` is not finite; on ranks other than 0 `ToldElsewhere`.
    """
    if not math.isfinite(value):
        message = (
            f"{name}: is {value}; the weights were not changed. "
            "Lower optimizer.learning_rate, raise schedule.warmup_steps or use model.dtype=float32"
        )
        raise OstroError(message) if Ranks.current().is_main else ToldElsewhere(message)

"""The pieces of an optimizer step that both loops share: learning rate, optimizer, clipping, and the guard against
non-finite numbers.

What the loss is, and what a batch is, belongs to each loop.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from ostro.errors import OstroError
from ostro.parallel.gradients import gradient_norm, mesh_of
from ostro.parallel.mesh import Mesh
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
        mesh: Mesh | None = None,
        *,
        counted_elsewhere: Collection[str] = (),
    ) -> None:
        """Builds two groups per learning rate: matrices with weight decay, everything else without.

        Args:
            weights: Trainable float32 weights by name.
            options: Hyper-parameters.
            rate_factors: What the learning rate of a weight is multiplied by, where it is not 1, by name.
            mesh: How the ranks of the run are laid out; None for one process.
            counted_elsewhere: Names whose gradients are in the norm of another stage of a pipeline.
        """
        self._weights, self._counted = dict(weights), set(weights) - set(counted_elsewhere)
        self._options, self._mesh = options, mesh
        by_kind: dict[tuple[float, bool, DeviceMesh | None], list[torch.nn.Parameter]] = {}
        for name, weight in self._weights.items():
            # by mesh: a fused step takes weights split over the same ranks, or whole ones
            kind = ((rate_factors or {}).get(name, 1.0), weight.ndim >= 2, mesh_of(weight))
            by_kind.setdefault(kind, []).append(weight)
        if not by_kind:  # a stage whose parts are all frozen
            by_kind[1.0, False, None] = []
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
        weights = {name: weight for name, weight in self._weights.items() if weight.grad is not None}
        counted = [weight.grad for name, weight in weights.items() if name in self._counted]
        norm = gradient_norm([gradient for gradient in counted if gradient is not None], self._mesh)
        check_finite("gradient norm", norm.item())
        if self._options.max_grad_norm is not None:
            kinds: dict[DeviceMesh | None, list[torch.nn.Parameter]] = {}
            for weight in weights.values():
                kinds.setdefault(mesh_of(weight), []).append(weight)
            for kind in kinds.values():
                torch.nn.utils.clip_grads_with_norm_(kind, self._options.max_grad_norm, norm)
        for group, factor in zip(self._adamw.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)


def check_finite(name: str, value: float) -> None:
    """Stops a run whose numbers have become infinite or nan, before they reach the weights.

    Args:
        name: What it is.
        value: The same on all ranks.

    Raises:
        OstroError: When `value` is not finite; on ranks other than 0 `ToldElsewhere`.
    """
    with Ranks.current().told_once():
        if not math.isfinite(value):
            raise OstroError(
                f"{name}: is {value}; the weights were not changed. "
                "Lower optimizer.learning_rate, raise schedule.warmup_steps or use model.dtype=float32"
            )

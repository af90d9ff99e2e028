"""Learning rate, optimizer and the guard against non-finite numbers."""

from __future__ import annotations

import math

import pytest
import torch

from ostro.errors import OstroError
from ostro.train.options import OptimizerOptions, ScheduleOptions
from ostro.train.step import Optimizer, check_finite, learning_rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        (
            "cosine",
            [
                0.5,
                1.0,
                1.0,
                0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2,
                0.55,
                0.1 + 0.9 * (1 - math.cos(math.pi / 4)) / 2,
            ],
        ),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_by_hand(kind: str, expected: list[float]) -> None:
    options = ScheduleOptions.model_validate({"kind": kind, "warmup_steps": 2, "final_ratio": 0.1})
    rates = [learning_rate(step, num_steps=6, peak=1.0, options=options) for step in range(6)]
    assert rates == pytest.approx(expected)


def weights() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"matrix": torch.nn.Parameter(torch.randn(3, 2)), "norm": torch.nn.Parameter(torch.ones(2))}


def with_gradients(parameters: dict[str, torch.nn.Parameter], scale: float = 1.0) -> None:
    for weight in parameters.values():
        weight.grad = scale * torch.arange(1.0, weight.numel() + 1).view_as(weight)


def test_a_step_is_adamw_with_clipping_and_without_decay_of_vectors() -> None:
    ours, reference = weights(), weights()
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1.0)
    optimizer = Optimizer(ours, options)
    plain = torch.optim.AdamW(
        [{"params": [reference["matrix"]], "weight_decay": 0.5}, {"params": [reference["norm"]], "weight_decay": 0.0}],
        lr=0.1,
    )
    for _ in range(3):
        with_gradients(ours)
        with_gradients(reference)
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.values(), 1.0)
        assert optimizer.step(0.1) == pytest.approx(expected_norm.item())
        plain.step()
        for name in ours:
            torch.testing.assert_close(ours[name], reference[name])
            assert ours[name].grad is None


def test_state_copied_into_a_fresh_optimizer_continues_equally() -> None:
    first = weights()
    optimizer = Optimizer(first, OptimizerOptions(learning_rate=0.1))
    with_gradients(first)
    optimizer.step(0.1)
    second = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in first.items()}
    resumed = Optimizer(second, OptimizerOptions(learning_rate=0.1))
    for name, state in resumed.state_dict().items():
        for key, value in state.items():
            value.copy_(optimizer.state_dict()[name][key])
    for parameters, stepper in ((first, optimizer), (second, resumed)):
        with_gradients(parameters, -2.0)
        stepper.step(0.1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_nan_gradient_leaves_weights_and_moments_alone() -> None:
    parameters = weights()
    optimizer = Optimizer(parameters, OptimizerOptions())
    with_gradients(parameters)
    parameters["norm"].grad = torch.tensor([float("nan"), 1.0])
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    with pytest.raises(OstroError, match=r"gradient norm: is nan; the weights were not changed"):
        optimizer.step(0.1)
    assert all(torch.equal(before[name], parameters[name]) for name in before)
    assert all(not state["exp_avg"].any() and not state["step"].any() for state in optimizer.state_dict().values())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_check_finite(value: float) -> None:
    check_finite("loss", 3.0)
    with pytest.raises(OstroError, match=r"^loss: is "):
        check_finite("loss", value)

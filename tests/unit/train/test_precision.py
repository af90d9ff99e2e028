"""Float32 masters: sums and small updates that bf16 would lose."""

from __future__ import annotations

import torch

from ostro.train.precision import MasterWeights


def test_gradients_of_many_micro_batches_sum_in_float32() -> None:
    linear = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters = MasterWeights(linear).named_parameters()
    for _ in range(1000):
        linear(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    # bf16 has 8 bits: a sum of ones stops at 256
    assert masters["weight"].grad is not None
    assert masters["weight"].grad.item() == 1000
    assert linear.weight.grad is None


def test_small_updates_add_up() -> None:
    linear = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(linear.weight)
    masters = MasterWeights(linear)
    for _ in range(100):
        with torch.no_grad():
            masters.named_parameters()["weight"].add_(1e-3)  # below the step of bf16 at 1, which is 1/128
        masters.publish()
    assert linear.weight.item() == torch.tensor(1.1).bfloat16().item()


def test_float32_weights_are_their_own_masters_and_frozen_ones_have_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    masters = MasterWeights(model).named_parameters()
    assert list(masters) == ["1.weight", "1.bias"]
    assert masters["1.weight"] is model[1].weight

"""On a CUDA device: a packed step is no further from float32 than on the CPU, and a vision-language run trains."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ostro.train import vlm
from ostro.train.vlm_loss import packed_loss
from tests.helpers.vlm_runs import make_inputs, recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm-cuda")
    make_inputs(folder)
    return folder


def loss_and_gradient(inputs: Path, dtype: str, device: str) -> tuple[float, torch.Tensor]:
    run = recipe(inputs, inputs / "unused", model={"dtype": dtype}, data={"micro_batch_tokens": 4096})
    model, encoder = vlm.build_model(run)
    model.to(device)
    with vlm.open_loader(run, encoder) as loader:
        step = next(loader)
    (batch,) = step.micro_batches
    loss = packed_loss(model, batch.to(model.device), step.num_supervised)
    loss.backward()
    gradient = torch.cat(
        [weight.grad.flatten().float().cpu() for weight in model.parameters() if weight.grad is not None]
    )
    return float(loss.detach()), gradient


def test_a_packed_step_is_no_further_from_float32_than_on_the_cpu(inputs: Path) -> None:
    exact_loss, exact = loss_and_gradient(inputs, "float32", "cpu")
    loss, gradient = loss_and_gradient(inputs, "float32", "cuda")
    # float32 without tf32, the torch default: sums are taken in another order
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert (gradient - exact).norm() <= 1e-4 * exact.norm()
    _, on_cpu = loss_and_gradient(inputs, "bfloat16", "cpu")
    _, on_device = loss_and_gradient(inputs, "bfloat16", "cuda")
    # the two round at other places: a half more
    assert (on_device - exact).norm() <= 1.5 * (on_cpu - exact).norm()


def test_a_run_learns(inputs: Path, tmp_path: Path) -> None:
    run = recipe(inputs, tmp_path / "run", train={"num_steps": 40, "evaluate_every": None, "save_every": None})
    assert vlm.run(run, console=Console(file=io.StringIO())).metrics["exact match"] == 1.0

"""The loss of packed conversations: what fills a batch up to a round number of rows changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostro.data.conversation_loader import ConversationStep
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import PackedTexts
from ostro.train import vlm, vlm_loss
from tests.helpers.vlm_runs import make_inputs, recipe


def loss_and_gradients(
    model: Mistral3FP8VLMForConditionalGeneration, step: ConversationStep
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(vlm_loss.packed_loss(model, batch, step.num_supervised) for batch in step.micro_batches)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_filling_up_a_batch_changes_neither_loss_nor_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    model, encoder = vlm.build_model(recipe(tmp_path, tmp_path / "run"))
    model = model.bfloat16()
    with vlm.open_loader(recipe(tmp_path, tmp_path / "run"), encoder) as loader:
        step = next(loader)
    sizes = []
    real = vlm_loss.fill_up

    def noted(texts: PackedTexts) -> PackedTexts:
        sizes.append((texts.num_tokens, real(texts).num_tokens))
        return real(texts)

    monkeypatch.setattr(vlm_loss, "fill_up", noted)
    loss, gradients = loss_and_gradients(model, step)
    monkeypatch.setattr(vlm_loss, "fill_up", lambda texts: texts)
    plain_loss, plain = loss_and_gradients(model, step)
    assert any(filled > given for given, filled in sizes)
    assert loss == pytest.approx(plain_loss, rel=1e-3)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        scale = plain[name].float().norm().item()
        assert (gradient.float() - plain[name].float()).norm().item() <= 0.02 * scale, name

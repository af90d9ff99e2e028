"""Freezing and learning rates by named part."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from ostro.errors import RecipeError
from ostro.train.options import Part
from ostro.train.parts import PARTS, freeze, part_of, rate_factors
from tests.helpers.tiny import vlm_config


def model(*, tied: bool = False) -> Mistral3ForConditionalGeneration:
    with torch.device("meta"):
        made = Mistral3ForConditionalGeneration(vlm_config(tie_word_embeddings=tied))
    if tied:
        made.tie_weights()
    return made


def test_every_parameter_belongs_to_one_part_and_every_part_has_some() -> None:
    assert {part_of(name) for name, _ in model().named_parameters()} == set(PARTS)
    with pytest.raises(ValueError, match=r"^score.weight: belongs to no part"):
        part_of("score.weight")


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_keeps_its_weights_and_the_others_do_not(part: Part, caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    with caplog.at_level(logging.INFO, logger="ostro"):
        trained = freeze(made, [part])
    for name, weight in made.named_parameters():
        assert weight.requires_grad == (part_of(name) != part), name
    assert set(trained) == set(PARTS) - {part}
    assert sum(trained.values()) == sum(weight.numel() for weight in made.parameters() if weight.requires_grad)
    assert caplog.messages[0].startswith("trains: ")
    assert caplog.messages[0].endswith(f"; frozen: {part}")


def test_a_tied_head_is_no_part_of_its_own() -> None:
    message = (
        r"^model.freeze: the model has no part head of its own; the head is the embedding \(tied\); name embeddings"
    )
    with pytest.raises(RecipeError, match=message):
        freeze(model(tied=True), ["head"])
    with pytest.raises(RecipeError, match=r"^optimizer.part_learning_rates.head: the model has no part head"):
        rate_factors(model(tied=True), {"head": 1e-3}, 1e-3)


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model.freeze: .* is all there is; leave a part to train"):
        freeze(model(), PARTS)


def test_a_part_has_the_rate_it_was_given() -> None:
    factors = rate_factors(model(), {"vision": 1e-4, "projector": 2e-3}, 1e-3)
    assert factors["model.vision_tower.patch_conv.weight"] == pytest.approx(0.1)
    assert factors["model.multi_modal_projector.norm.weight"] == pytest.approx(2.0)
    assert {part_of(name) for name in factors} == {"vision", "projector"}

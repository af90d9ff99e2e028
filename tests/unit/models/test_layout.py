"""Layouts against the names that transformers itself gives and reads."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Ministral3ForCausalLM,
    Ministral3ForSequenceClassification,
    Ministral3Model,
    Mistral3ForConditionalGeneration,
)

from ostro.errors import LayoutError
from ostro.models.layout import BARE, IDENTITY, LAYOUTS, NATIVE, NESTED, TEXT_LINEAR, TEXT_ONLY, Layout, recognise
from tests.helpers.fp8_folder import stored_name
from tests.helpers.native_folder import native_name
from tests.helpers.tiny import text_config, vlm_config

with torch.device("meta"):
    RUNTIME = list(Mistral3ForConditionalGeneration(vlm_config()).state_dict())
    TEXT = list(Ministral3ForCausalLM(text_config()).state_dict())
    TOWER = list(Ministral3Model(text_config()).state_dict())
    CLASSIFIER = list(Ministral3ForSequenceClassification(text_config()).state_dict())
STORED = {
    NESTED: [stored_name(key, "nested") for key in RUNTIME],
    IDENTITY: RUNTIME,
    TEXT_ONLY: TEXT,
    BARE: TOWER,
    NATIVE: [native_name(key) for key in RUNTIME],
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_is_recognised_and_goes_both_ways(layout: Layout) -> None:
    stored = STORED[layout]
    assert recognise(stored) is layout
    runtime = [layout.to_runtime(key) for key in stored]
    assert set(runtime) <= set(RUNTIME)
    assert [layout.to_stored(key) for key in runtime] == stored


def test_names_go_from_any_layout_to_any_other() -> None:
    towers = {
        layout: {key for key in keys if "layers." in key and "vision" not in key} for layout, keys in STORED.items()
    }
    for source, keys in towers.items():
        for target in LAYOUTS:
            assert {target.to_stored(source.to_runtime(key)) for key in keys} == towers[target]


def test_scales_follow_their_weight() -> None:
    linear = "layers.12.mlp.up_proj."
    for name in ("weight_scale_inv", "activation_scale"):
        assert NESTED.to_runtime(f"language_model.model.{linear}{name}") == f"model.language_model.{linear}{name}"


def test_native_scales_have_other_names() -> None:
    for name, stored in (("weight_scale_inv", "qscale_weight"), ("activation_scale", "qscale_act")):
        runtime = f"model.language_model.layers.3.self_attn.o_proj.{name}"
        assert NATIVE.to_runtime(f"layers.3.attention.wo.{stored}") == runtime
        assert NATIVE.to_stored(runtime) == f"layers.3.attention.wo.{stored}"


def test_native_rows_are_interleaved_in_q_and_k_of_both_towers() -> None:
    interleaved = {key for key in RUNTIME if NATIVE.interleaves(key)}
    assert interleaved == {key for key in RUNTIME if key.endswith(("q_proj.weight", "k_proj.weight"))}
    assert len(interleaved) == 2 * 2 + 2 * 2
    assert not any(layout.interleaves(key) for layout in (NESTED, IDENTITY, TEXT_ONLY, BARE) for key in RUNTIME)


def test_native_keys_that_are_no_part_of_the_model_are_skipped() -> None:
    key = "layers.0.attention.wq.weight_fake_quantizer.amax"
    assert recognise([*STORED[NATIVE], key]) is NATIVE
    assert NATIVE.skips(key)
    assert not any(NATIVE.skips(key) for key in STORED[NATIVE])


def test_a_classifier_is_text_only() -> None:
    assert recognise(CLASSIFIER) is TEXT_ONLY


def test_one_released_key_by_hand() -> None:
    stored = "language_model.model.layers.25.self_attn.o_proj.weight"
    assert NESTED.to_runtime(stored) == "model.language_model.layers.25.self_attn.o_proj.weight"
    assert BARE.to_stored(NESTED.to_runtime(stored)) == "layers.25.self_attn.o_proj.weight"
    assert NESTED.to_stored("lm_head.weight") == "language_model.lm_head.weight"


def test_the_linears_of_a_text_layer_are_seven() -> None:
    linears = [key for key in RUNTIME if TEXT_LINEAR.fullmatch(key)]
    modules = dict(Mistral3ForConditionalGeneration(vlm_config()).model.language_model.named_modules())
    expected = {
        f"model.language_model.{name}.weight" for name, module in modules.items() if isinstance(module, torch.nn.Linear)
    }
    assert set(linears) == expected
    assert len(linears) == 7 * vlm_config().text_config.num_hidden_layers


def test_unmatched_keys_are_listed_with_the_layouts_tried() -> None:
    strange = [f"strange.{number:02d}.weight" for number in range(12)]
    with pytest.raises(LayoutError) as caught:
        recognise([*STORED[NESTED], *strange])
    message = str(caught.value)
    assert f"no layout covers all {len(RUNTIME) + 12} keys" in message
    assert "tried nested, identity, text-only, bare tower, native. Nearest is nested, without a place for 12" in message
    assert "strange.00.weight" in message
    assert "strange.09.weight" in message
    assert "strange.10.weight" not in message
    assert "and 2 more" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no tensor"),
        ([*TOWER, TOWER[3]], f"stored more than once: {TOWER[3]}"),
        (["lm_head.weight"], "fit the layouts identity and text-only; expected a text tower too"),
        ([*RUNTIME, *TEXT], "stored more than once: lm_head.weight"),
        ([*STORED[NESTED], "lm_head.weight"], "without a place for 1: lm_head.weight"),
        (["layers.zero.mlp.up_proj.weight"], "no layout covers"),
        ([*STORED[NATIVE], *TEXT], "no layout covers"),
    ],
)
def test_bad_sets_of_keys(keys: list[str], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        recognise(keys)


def test_a_key_without_a_place_says_which_there_are() -> None:
    with pytest.raises(LayoutError, match=r"^vision_tower\.x: no key of the text-only layout; it has model\.embed"):
        TEXT_ONLY.to_runtime("vision_tower.x")
    with pytest.raises(LayoutError, match=r"no runtime name of the bare tower layout"):
        BARE.to_stored("lm_head.weight")

"""Folders, keys and options that cannot become a backbone: each error names its cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Ministral3ForCausalLM, Mistral3ForConditionalGeneration

from ostro.errors import CheckpointError, LayoutError
from ostro.models.backbone import build_encoder_backbone
from tests.helpers.fp8_folder import edit_weights, write_fp8_folder
from tests.helpers.tiny import text_config, vlm_config

PROJECTION = "language_model.model.layers.1.mlp.up_proj.weight"
"""A weight's key in the nested layout."""


@pytest.fixture
def vlm_folder(tmp_path: Path) -> str:
    Mistral3ForConditionalGeneration(vlm_config()).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def text_folder(tmp_path: Path) -> str:
    Ministral3ForCausalLM(text_config()).save_pretrained(tmp_path)
    return str(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(PROJECTION), r"1 missing \(language_model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (lambda weights: weights.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (lambda weights: weights.pop(f"{PROJECTION}_scale_inv"), r"1 FP8 weights without weight_scale_inv \(lang"),
        (
            lambda weights: weights.update({PROJECTION: weights[PROJECTION][:60].clone()}),
            r"1 of another shape \(language_model\.layers\.1\.mlp\.up_proj\.weight \[60, 32\] for \[64, 32\]\)",
        ),
        (
            lambda weights: [weights.pop(key) for key in list(weights) if "layers.0" in key and key.startswith("lang")],
            r"9 missing \(language_model\.layers\.0\.input_layernorm",
        ),
    ],
    ids=["missing", "unexpected", "no scale", "shape", "no layer 0"],
)
def test_keys_that_do_not_fit_are_listed(tmp_path: Path, change: Any, message: str) -> None:
    write_fp8_folder(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(LayoutError, match=message):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_at_most_ten_keys_are_listed(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({f"extra.{i:02}": torch.ones(1) for i in range(12)}))
    with pytest.raises(LayoutError, match=r"12 unexpected \(extra\.00, .*, extra\.09 and 2 more\)"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_a_lost_quantization_config_is_not_read_as_plain_weights(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(LayoutError, match=r"14 unexpected .*weight_scale_inv"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_a_scale_that_does_not_fit_its_weight_is_an_error(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({f"{PROJECTION}_scale_inv": torch.ones(7, 1)}))
    with pytest.raises(CheckpointError, match="transformers cannot read the weights"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_truncated_weights_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, num_shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: has \d+ bytes"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_a_submodel_of_a_text_only_folder_is_an_error(text_folder: str) -> None:
    with pytest.raises(LayoutError, match=r"is text-only \(model_type 'ministral3'\) and has no part 'language_model'"):
        build_encoder_backbone(text_folder, "embedding", extract_submodel="language_model")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("language_model.layers", ValueError, r"'language_model\.layers' is a ModuleList without a \.config"),
        ("multi_modal_projector", ValueError, r"is a Mistral3MultiModalProjector without a \.config"),
        (
            "langauge_model",
            ValueError,
            "no part 'langauge_model' in Mistral3Model, which has vision_tower, multi_modal",
        ),
        ("vision_tower", LayoutError, r"vision_tower: model_type must be one of ministral3, .* got 'pixtral'"),
    ],
)
def test_a_submodel_that_is_no_text_tower_is_an_error(
    vlm_folder: str, path: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_encoder_backbone(vlm_folder, "embedding", extract_submodel=path)


def test_another_family_is_an_error(text_folder: str) -> None:
    Path(text_folder, "config.json").write_text(LlamaConfig().to_json_string())
    with pytest.raises(LayoutError, match=r"config\.json: model_type must be one of ministral3, .* got 'llama'"):
        build_encoder_backbone(text_folder, "embedding")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", CheckpointError),
        ("[]", LayoutError),
        ('{"model_type": "unheard_of"}', LayoutError),
        ('{"model_type": "ministral3", "hidden_size": "wide"}', LayoutError),
        ('{"model_type": "ministral3_bidirec", "is_causal": true}', LayoutError),
    ],
)
def test_a_bad_config_is_an_error(text_folder: str, text: str, error: type[Exception]) -> None:
    Path(text_folder, "config.json").write_text(text)
    with pytest.raises(error, match=r"config\.json") as raised:
        build_encoder_backbone(text_folder, "embedding")
    assert "\n" not in str(raised.value)


def test_another_quantisation_is_an_error(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(LayoutError, match=r"quant_method must be 'fp8' or absent, got 'awq'"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_a_native_only_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(LayoutError, match="native layout"):
        build_encoder_backbone(str(tmp_path), "embedding")


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        build_encoder_backbone(str(tmp_path / "nothing"), "embedding")
    with pytest.raises(CheckpointError, match=r"ostro-tests/nothing: no config\.json can be read there or on the hub"):
        build_encoder_backbone("ostro-tests/nothing", "embedding", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("retrieval", {}, "task: must be one of embedding, score, got 'retrieval'"),
        ("embedding", {"num_labels": 2}, "num_labels: only for task 'score'"),
        ("score", {"pooling": "avg"}, "pooling, temperature: only for task 'embedding'"),
        ("embedding", {"pooling": "max"}, "pooling: must be one of avg, .* got 'max'"),
        ("embedding", {"temperature": 0}, "temperature: must be > 0, got 0"),
    ],
)
def test_options_are_checked_before_anything_is_read(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder_backbone("nowhere", task, **options)

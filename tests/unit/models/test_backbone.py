"""Backbones from every kind of folder: exact weights, complete keys, clean saves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Ministral3ForCausalLM,
    Ministral3ForSequenceClassification,
    Ministral3Model,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
)

from ostro.errors import LayoutError
from ostro.models.backbone import build_encoder_backbone, check_bidirectional
from ostro.models.ministral_bidirectional import Ministral3BidirectionalModel
from tests.helpers.fp8_folder import edit_weights, write_fp8_folder
from tests.helpers.tiny import padded, text_config, token_ids, vlm_config

PROJECTION = "language_model.model.layers.1.mlp.up_proj.weight"
"""A weight's key in the nested layout."""


def mistral_config() -> MistralConfig:
    """A Mistral-Small-like text tower."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralConfig(**sizes, **heads, sliding_window=None, initializer_range=0.2)


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vlm_folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return save(Mistral3ForConditionalGeneration(vlm_config()), tmp_path / "vlm")


@pytest.fixture
def text_folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return save(Ministral3ForCausalLM(text_config()), tmp_path / "text")


def hidden(model: torch.nn.Module) -> torch.Tensor:
    """Last hidden states of a padded batch, at its tokens."""
    input_ids, mask = padded(token_ids([4, 30]))
    with torch.no_grad():
        states: torch.Tensor = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return states[mask.bool()]


def bidirectional(tower: PreTrainedModel) -> PreTrainedModel:
    """The stock tower, told by its config to see both ways."""
    tower.config.is_causal = False
    return tower.eval()


def assert_equal_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["nested", "identity", "text_only"])
def test_fp8_weights_are_dequantised_bit_for_bit(tmp_path: Path, layout: str, tied: bool) -> None:
    truth = write_fp8_folder(tmp_path, layout=layout, tie_word_embeddings=tied)
    model = build_encoder_backbone(str(tmp_path), "embedding")
    assert type(model) is Ministral3BidirectionalModel
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_equal_weights(model, truth)


@pytest.mark.parametrize(("scale_shape", "num_shards"), [((1,), 1), ((), 3)], ids=["scale of shape (1,)", "3 shards"])
def test_fp8_variants_are_dequantised_bit_for_bit(
    tmp_path: Path, scale_shape: tuple[int, ...], num_shards: int
) -> None:
    truth = write_fp8_folder(tmp_path, scale_shape=scale_shape, num_shards=num_shards)
    assert_equal_weights(build_encoder_backbone(str(tmp_path), "embedding"), truth)


@pytest.mark.parametrize("dtype", [torch.float32, "float32"], ids=str)
def test_fp8_as_float32_is_the_bfloat16_model_upcast(tmp_path: Path, dtype: Any) -> None:
    truth = write_fp8_folder(tmp_path)
    model = build_encoder_backbone(str(tmp_path), "embedding", dtype=dtype)
    assert_equal_weights(model, {key: weight.float() for key, weight in truth.items()})
    stock = Ministral3Model(text_config())
    stock.load_state_dict(truth)
    assert torch.equal(hidden(model), hidden(bidirectional(stock)))


@pytest.mark.parametrize("fp8", [True, False], ids=["FP8 parent", "BF16 parent"])
@pytest.mark.parametrize("layout", ["nested", "text_only"])
def test_a_saved_backbone_reloads_exactly(tmp_path: Path, layout: str, fp8: bool) -> None:
    if fp8:
        write_fp8_folder(tmp_path / "parent", layout=layout)
    elif layout == "nested":
        save(Mistral3ForConditionalGeneration(vlm_config()).bfloat16(), tmp_path / "parent")
    else:
        save(Ministral3ForCausalLM(text_config()).bfloat16(), tmp_path / "parent")
    model = build_encoder_backbone(str(tmp_path / "parent"), "embedding", pooling="last", temperature=0.02)
    save(model, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in stored
    assert (stored["model_type"], stored["dtype"]) == ("ministral3_bidirec", "bfloat16")
    for reloaded in (
        AutoModel.from_pretrained(tmp_path / "saved"),
        build_encoder_backbone(str(tmp_path / "saved"), "embedding"),
    ):
        assert_equal_weights(reloaded, model.state_dict())
        assert torch.equal(hidden(reloaded), hidden(model))
        assert (reloaded.config.pooling, reloaded.config.temperature) == ("last", 0.02)


def as_hub_cache(folder: Path, cache: Path, name: str) -> None:
    """Lays a folder out as the download cache keeps a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))


def test_a_hub_id_is_read_as_a_folder_is(tmp_path: Path) -> None:
    truth = write_fp8_folder(tmp_path / "whole", num_shards=2)
    as_hub_cache(tmp_path / "whole", tmp_path / "cache", "ostro-tests/whole")
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert_equal_weights(build_encoder_backbone("ostro-tests/whole", "embedding", **options), truth)

    write_fp8_folder(tmp_path / "bare")
    edit_weights(tmp_path / "bare", lambda weights: weights.pop(f"{PROJECTION}_scale_inv"))
    as_hub_cache(tmp_path / "bare", tmp_path / "cache", "ostro-tests/bare")
    with pytest.raises(LayoutError, match=r"ostro-tests/bare: .* 1 FP8 without scale \(layers\.1\.mlp\.up_proj"):
        build_encoder_backbone("ostro-tests/bare", "embedding", **options)


def test_the_tower_of_a_vlm_is_extracted(vlm_folder: str) -> None:
    tower = AutoModel.from_pretrained(vlm_folder).language_model
    for path in (None, "language_model"):
        model = build_encoder_backbone(vlm_folder, "embedding", extract_submodel=path)
        assert_equal_weights(model, tower.state_dict())
        torch.testing.assert_close(hidden(model), hidden(bidirectional(tower)), atol=0, rtol=0)
    assert model.config.name_or_path == vlm_folder
    assert model.config.use_cache is False


def test_settings_come_from_the_call_then_the_folder_then_the_defaults(text_folder: str, tmp_path: Path) -> None:
    model = build_encoder_backbone(text_folder, "embedding")
    assert (model.config.pooling, model.config.temperature) == ("avg", 1.0)
    model.config.pooling, model.config.temperature = "cls", 0.05
    folder = save(model, tmp_path / "saved")
    assert build_encoder_backbone(folder, "embedding").config.pooling == "cls"
    changed = build_encoder_backbone(folder, "embedding", pooling="weighted_avg", temperature=0.01)
    assert (changed.config.pooling, changed.config.temperature) == ("weighted_avg", 0.01)


def test_an_export_with_the_stock_type_opens_as_a_bidirectional_model(text_folder: str, tmp_path: Path) -> None:
    model = build_encoder_backbone(text_folder, "embedding")
    stock = Ministral3Model(text_config(is_causal=False, pooling="last", use_cache=False))
    stock.load_state_dict(model.state_dict())
    reopened = build_encoder_backbone(save(stock, tmp_path / "export"), "embedding")
    assert type(reopened) is Ministral3BidirectionalModel
    assert reopened.config.pooling == "last"
    assert torch.equal(hidden(reopened), hidden(model))


def test_the_attention_implementation_is_honoured(vlm_folder: str, text_folder: str) -> None:
    for folder in (vlm_folder, text_folder):
        model = build_encoder_backbone(folder, "embedding", attn_implementation="eager")
        ids = torch.tensor(token_ids([4]))
        assert model(input_ids=ids, output_attentions=True).attentions[0].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("task", ["embedding", "score"])
@pytest.mark.parametrize("vlm", [True, False], ids=["vlm", "text"])
def test_a_mistral_tower_keeps_its_stock_class(tmp_path: Path, vlm: bool, task: str) -> None:
    if vlm:
        config = vlm_config()
        config.text_config = mistral_config()
        folder = save(Mistral3ForConditionalGeneration(config), tmp_path / "parent")
        tower = AutoModel.from_pretrained(folder).language_model
    else:
        folder = save(MistralForCausalLM(mistral_config()), tmp_path / "parent")
        tower = AutoModel.from_pretrained(folder)
    model = build_encoder_backbone(folder, task)
    assert_equal_weights(model.base_model, tower.state_dict())
    if task == "score":
        assert type(model).__name__ == "MistralForSequenceClassification"
        return
    assert type(model) is MistralModel
    assert torch.equal(hidden(model), hidden(bidirectional(tower)))
    reloaded = AutoModel.from_pretrained(save(model, tmp_path / "saved"))
    assert reloaded.config.pooling == "avg"
    check_bidirectional(reloaded)
    assert torch.equal(hidden(reloaded), hidden(model))
    with pytest.raises(ValueError, match="temperature: the config of a mistral tower has no place for it"):
        build_encoder_backbone(folder, task, temperature=0.02)


@pytest.mark.parametrize("kind", ["vlm", "text", "fp8"])
def test_score_adds_a_head_and_says_so(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    if kind == "fp8":
        write_fp8_folder(tmp_path / "fp8")
        folder = str(tmp_path / "fp8")
    else:
        folder = request.getfixturevalue(f"{kind}_folder")
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="ostro"):
        model = build_encoder_backbone(folder, "score", num_labels=5)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ostro")] == [
        f"{folder}: has no score.weight; the head is new and needs training"
    ]
    assert type(model) is Ministral3ForSequenceClassification
    assert model.score.weight.shape == (5, 32)
    assert 0.15 < model.score.weight.float().std() < 0.25
    assert_equal_weights(model.model, build_encoder_backbone(folder, "embedding").state_dict())
    input_ids, mask = padded(token_ids([4, 30]))
    assert model(input_ids=input_ids, attention_mask=mask).logits.shape == (2, 5)


def test_score_on_a_language_model_stays_causal(text_folder: str) -> None:
    with pytest.raises(LayoutError, match=r"attention is causal, expected bidirectional \(no padding"):
        check_bidirectional(build_encoder_backbone(text_folder, "score").model)


def test_a_classifier_folder_keeps_its_head(text_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_encoder_backbone(text_folder, "score")
    assert model.config.num_labels == 1
    folder = save(build_encoder_backbone(text_folder, "score", num_labels=3), tmp_path / "classifier")
    caplog.clear()
    for reloaded in (
        build_encoder_backbone(folder, "score"),
        build_encoder_backbone(folder, "score", num_labels=3),
        AutoModelForSequenceClassification.from_pretrained(folder),
    ):
        assert reloaded.score.weight.shape == (3, 32)
        assert torch.equal(reloaded.score.weight, load_file(f"{folder}/model.safetensors")["score.weight"])
    assert not [record for record in caplog.records if record.name.startswith("ostro")]
    with pytest.raises(LayoutError, match=r"1 of another shape \(score\.weight \[3, 32\] for \[2, 32\]\)"):
        build_encoder_backbone(folder, "score", num_labels=2)
    with pytest.raises(LayoutError, match=r"1 unexpected \(score\.weight\)"):
        build_encoder_backbone(folder, "embedding")


def test_score_on_an_embedding_folder_stays_bidirectional(text_folder: str, tmp_path: Path) -> None:
    folder = save(build_encoder_backbone(text_folder, "embedding", temperature=0.02), tmp_path / "embedding")
    model = build_encoder_backbone(folder, "score")
    assert type(model) is Ministral3ForSequenceClassification
    check_bidirectional(model.model)
    check_bidirectional(AutoModelForSequenceClassification.from_pretrained(save(model, tmp_path / "score")).model)


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_passes_a_bidirectional_model_and_leaves_it_alone(text_folder: str, training: bool) -> None:
    model = build_encoder_backbone(text_folder, "embedding").train(training)
    check_bidirectional(model)
    assert model.training is training


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_probe_finds_causal_attention(attention: str) -> None:
    model = Ministral3Model(text_config())
    model.set_attn_implementation(attention)
    with pytest.raises(LayoutError, match="Ministral3Model: attention is causal, expected bidirectional"):
        check_bidirectional(model)


def test_the_probe_finds_attention_that_is_causal_only_with_padding() -> None:
    """Flags on the layers without a mask: sdpa sees both ways until a batch has padding."""
    model = Ministral3Model(text_config())
    for layer in model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(LayoutError, match=r"causal, expected bidirectional \((right|left) padding"):
        check_bidirectional(model)

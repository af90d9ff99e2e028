"""Folders that contradict themselves or are damaged: each is refused by name, before or instead of a wrong model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ostro.checkpoint.auto import AutoModelForImageTextToText
from ostro.checkpoint.fetch import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.errors import CheckpointError, LayoutError
from tests.helpers.fp8_folder import edit_weights, write_fp8_folder
from tests.helpers.native_folder import write_native_folder
from tests.helpers.tiny import text_config, vlm_config

Tensors = dict[str, torch.Tensor]
LINEAR = "language_model.model.layers.1.mlp.up_proj."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fp8_folder(tmp_path)
    return tmp_path


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def with_value(key: str, place: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    """Puts a value into a tensor; for FP8 the nearest there is."""

    def change(tensors: Tensors) -> None:
        values = tensors[key].float()
        values[place] = value
        tensors[key] = values.to(tensors[key].dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LINEAR + "weight_scale_inv"), rf"FP8 weights without their weight_scale_inv: {LINEAR}weight"),
        (lambda t: t.pop(LINEAR + "weight"), r"scales of weights that are absent or not stored as FP8"),
        (
            lambda t: t.update({LINEAR + "weight_scale": t.pop(LINEAR + "weight_scale_inv")}),
            "scales of an unknown name",
        ),
        (lambda t: t.update({LINEAR + "weight_scale_inv": torch.ones(5, 2)}), r"shape \(5, 2\) does not divide"),
        (
            lambda t: t.update({LINEAR + "weight": t[LINEAR + "weight"].view(torch.uint8)}),
            "absent or not stored as FP8",
        ),
        (
            lambda t: t.update({LINEAR + "weight_scale_inv": torch.tensor(2, dtype=torch.int32)}),
            r"expected tensors of type",
        ),
        (
            lambda t: t.pop("vision_tower.ln_pre.weight"),
            r"1 missing: model\.vision_tower\.ln_pre\.weight; do they belong",
        ),
        (lambda t: t.update({"vision_tower.more.weight": torch.ones(2)}), r"1 unexpected: vision_tower\.more\.weight"),
        (
            lambda t: t.update({"vision_tower.ln_pre.weight": torch.ones(7)}),
            r"\(nested layout\): .* 1 of another shape: vision_tower\.ln_pre\.weight \[7\] for \[32\]",
        ),
        (lambda t: t.update({"more.weight": torch.ones(2)}), "no layout covers all"),
        (
            lambda t: t.update({"language_model.lm_head.weight": torch.ones(96, 32)}),
            r"tie_word_embeddings is true, but a head is stored \(language_model\.lm_head\.weight\)",
        ),
    ],
)
def test_bad_keys_are_named(folder: Path, change: Callable[[Tensors], object], message: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(LayoutError, match=message) as caught:
        load_vlm(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value(LINEAR + "weight_scale_inv", (), 0.0), r"up_proj\.weight_scale_inv: must be > 0 and finite"),
        (with_value(LINEAR + "weight_scale_inv", (), float("nan")), "must be > 0 and finite"),
        (with_value(LINEAR + "weight_scale_inv", (), 1e37), "must be > 0 and finite in torch.bfloat16 times 448"),
        (with_value(LINEAR + "weight", (60, 3), float("nan")), rf"{LINEAR}weight: has infinite or nan values in rows"),
        (with_value("vision_tower.ln_pre.weight", (3,), float("inf")), r"ln_pre\.weight: has infinite or nan"),
        (with_value("language_model.model.embed_tokens.weight", (90, 1), float("nan")), "has infinite or nan values"),
    ],
)
def test_values_that_are_no_numbers_are_named(folder: Path, change: Callable[[Tensors], object], message: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        load_vlm(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tie_word_embeddings=False), "tie_word_embeddings is false, but no head is stored"),
        (
            lambda c: c["text_config"]["rope_parameters"].pop("llama_4_scaling_beta"),
            r"has no text_config\.rope_parameters\.llama_4_scaling_beta, which the attention needs; add it",
        ),
        (lambda c: c["text_config"].update(num_hidden_layers=3), r"9 missing: model\.language_model\.layers\.2"),
        (lambda c: c["text_config"].update(num_hidden_layers=1), r"9 unexpected: language_model\.model\.layers\.1"),
        (lambda c: c["text_config"].update(vocab_size=100), r"embed_tokens\.weight \[96, 32\] for \[100, 32\]"),
        (
            lambda c: c.update(text_config={"model_type": "nonsense"}),
            "not a configuration that transformers understands",
        ),
        (lambda c: c.update(model_type="ministral3"), r"model_type must be 'mistral3', a vision-language model"),
    ],
)
def test_bad_configs_are_named(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_config(folder, change)
    with pytest.raises(LayoutError, match=message):
        load_vlm(folder)


def test_up_to_ten_keys_are_listed(folder: Path) -> None:
    edit_config(folder, lambda config: config["text_config"].update(num_hidden_layers=4))
    with pytest.raises(LayoutError, match=r"18 missing: .* and 8 more"):
        load_vlm(folder)


def test_a_text_folder_says_what_loads_it(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, layout="text_only")
    with pytest.raises(LayoutError, match=r"got 'ministral3'; a text model is loaded by .*build_encoder_backbone"):
        load_vlm(tmp_path)


@pytest.mark.parametrize("cut", [5, 60, -1])
def test_a_truncated_file_is_named(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has \d+ bytes, its header promises"):
        load_vlm(folder)


def test_a_flipped_bit_in_a_header_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    place = content.index(b'"F8_E4M3","shape":[64') + len(b'"F8_E4M3","shape":[')
    file.write_bytes(content[:place] + b"7" + content[place + 1 :])  # 6 and 7 differ in one bit
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header is damaged: .* is F8_E4M3 \[74, 32\]"):
        load_vlm(folder)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: names 1 files that are not there \(model-00002-of-00003"):
        load_vlm(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostro.checkpoint import reader

    headers = reader.read_headers(folder)
    monkeypatch.setattr(reader, "read_headers", lambda folder: headers)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*: the file ends at byte \d+, was it changed"):
        load_vlm(folder)


@pytest.mark.parametrize("native", [False, True])
def test_a_missing_folder_or_file(tmp_path: Path, native: bool) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_vlm(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such folder"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "none")
    write_fp8_folder(tmp_path / "whole", layout="identity")
    if native:
        write_native_folder(tmp_path / "native", tmp_path / "whole")
        (tmp_path / "native" / "params.json").unlink()
        with pytest.raises(LayoutError, match=r"no config\.json and no model\.safetensors; it holds Mistral's native"):
            load_vlm(tmp_path / "native")
    else:
        (tmp_path / "whole" / "config.json").unlink()
        with pytest.raises(LayoutError, match=r"config\.json"):
            load_vlm(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("n_layers"), r"params\.json: cannot be read as a Mistral-3 model \(KeyError\('n_layers'\)\)"),
        (lambda p: p["yarn"].update(factor="many"), "cannot be read as a Mistral-3 model"),
        (lambda p: p["quantization"].update(qformat_weight="int4"), "qformat_weight must be 'fp8_e4m3', got 'int4'"),
        (lambda p: p.update(dim=64), "of another shape"),
    ],
)
def test_bad_params_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    write_fp8_folder(tmp_path / "source", layout="identity")
    write_native_folder(tmp_path, tmp_path / "source")
    params = json.loads((tmp_path / "params.json").read_text())
    change(params)
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(LayoutError, match=message):
        load_vlm(tmp_path)


def test_native_keys_that_are_no_part_of_the_model_are_passed_over(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path / "source", layout="identity")
    write_native_folder(tmp_path, tmp_path / "source")
    file = tmp_path / "consolidated.safetensors"
    save_file(load_file(file) | {"layers.0.attention.wq.weight_fake_quantizer.amax": torch.ones(2)}, file)
    assert load_vlm(tmp_path).state_dict_adapter.layout.name == "native"


def test_a_stale_mscale_is_a_warning_with_both_values(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "params.json").write_text(json.dumps({"yarn": {"apply_scale": True}}))
    with caplog.at_level(logging.WARNING):
        load_vlm(folder)
    (record,) = [record for record in caplog.records if record.name == "ostro.checkpoint.load"]
    assert "mscale_all_dim 1.0, an attention scaling of 1.00000" in record.message
    assert "yarn.apply_scale of params.json is true, which means mscale_all_dim 0" in record.message
    caplog.clear()
    (folder / "params.json").write_text(json.dumps({"yarn": {"apply_scale": False}}))
    load_vlm(folder)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_another_precision_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype: must be one of"):
        load_vlm(folder, dtype=torch.float64)


def test_a_mistral_tower_needs_no_query_scale(tmp_path: Path) -> None:
    config = vlm_config()
    fields = text_config().to_dict() | {
        "model_type": "mistral",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    config = type(config)(text_config=fields, vision_config=config.vision_config.to_dict(), tie_word_embeddings=True)
    write_fp8_folder(tmp_path, config=config, fp8=False)
    model = load_vlm(tmp_path)
    assert type(model.model.language_model).__name__ == "MistralModel"


def test_a_name_that_no_hub_takes_is_told_in_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"^an organisation/na me: neither a folder here nor a model"):
        fetch_weights("an organisation/na me")

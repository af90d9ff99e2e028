"""What inspection says of good folders, and that every contradiction is found."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Ministral3Model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ostro.checkpoint.create import create_weights
from ostro.checkpoint.files import read_headers, weight_files
from ostro.checkpoint.inspect import inspect_folder
from ostro.checkpoint.report import FolderReport
from ostro.errors import CheckpointError, LayoutError
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder
from tests.helpers.tiny import text_config

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `ostro init` makes it: FP8, nested, tied."""
    folder = tmp_path_factory.mktemp("made") / "weights"
    create_weights(folder, size="tiny", layout="nested", precision="fp8", vocab_size=2048, seed=0)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "weights"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes values at the top of `config.json`, or with a `text_config__` prefix in the text part; None removes."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        block = config
        for part in path:
            block = block[part]
        block[last] = value
        if value is None:
            del block[last]
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_vision_language_folder(made: Path) -> None:
    report = inspect_folder(made)
    stored = load_file(made / "model.safetensors")
    scales = [key for key in stored if key.endswith(("scale", "scale_inv"))]
    assert (report.model_type, report.text_model_type) == ("mistral3", "ministral3")
    assert report.architectures == ("Mistral3ForConditionalGeneration",)
    assert (report.layout, report.num_files) == ("nested", 1)
    assert report.num_tensors == {"F8_E4M3": 21, "F32": 42, "BF16": len(stored) - 63}
    assert report.num_bytes["F8_E4M3"] == sum(t.numel() for t in stored.values() if t.dtype == torch.float8_e4m3fn)
    assert report.num_bytes["F32"] == 42 * 4
    assert sum(report.num_parameters.values()) == sum(stored[key].numel() for key in stored.keys() - set(scales))
    text = sum(tensor.numel() for key, tensor in stored.items() if key.startswith("language") and key not in scales)
    assert report.num_parameters["text"] == text
    assert report.num_parameters.keys() == {"text", "vision", "projector"}
    assert (report.fp8.num_weights, report.fp8.num_scales, report.fp8.scale_dtypes) == (21, 21, ("F32",))
    assert (report.quantization, report.tied_in_config, report.head_stored) == ("fp8", True, False)
    assert (report.is_causal, report.pooling, report.vocab_size) == (True, None, 2048)
    assert report.tokenizer.files == ("tokenizer.json", "tekken.json", "tokenizer_config.json")
    assert report.tokenizer.vocab_size == 2048
    assert report.problems == ()


@pytest.mark.parametrize("layout", ["identity", "text_only"])
def test_hand_written_folders(tmp_path: Path, layout: str) -> None:
    write_fp8_folder(tmp_path, layout=layout, tie_word_embeddings=False, scale_shape=(1,), num_shards=3)
    report = inspect_folder(tmp_path)
    assert (report.layout, report.num_files) == (layout.replace("_", "-"), 3)
    assert (report.tied_in_config, report.head_stored) == (False, True)
    assert report.num_parameters["head"] == 96 * 32
    assert report.fp8.num_scales == report.fp8.num_weights == 14
    assert report.tokenizer.files == ()
    assert report.problems == ()


def test_an_embedder_saved_by_transformers(tmp_path: Path) -> None:
    config = text_config(is_causal=False, pooling="avg")
    Ministral3Model(config).save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    report = inspect_folder(tmp_path)
    assert (report.layout, report.is_causal, report.pooling) == ("bare tower", False, "avg")
    assert (report.quantization, report.head_stored) == (None, False)
    assert report.problems == ()
    edit_config(tmp_path, is_causal=None)
    assert "causal attention" in problem(tmp_path)


def problem(folder: Path) -> str:
    """The only problem of a folder."""
    (sentence,) = inspect_folder(folder).problems
    return sentence


def linear(name: str) -> str:
    return f"language_model.model.layers.1.mlp.up_proj.{name}"


def test_a_missing_scale(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(linear("weight_scale_inv")) and None)
    report = inspect_folder(folder)
    assert report.fp8.missing_scales == (linear("weight"),)
    assert report.fp8.num_scales == 20
    assert f"without weight_scale_inv, their real values are unknown: {linear('weight')}" in problem(folder)


def test_a_scale_of_another_name(folder: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors[linear("weight_scale")] = tensors.pop(linear("weight_scale_inv"))

    edit_tensors(folder, rename)
    report = inspect_folder(folder)
    assert report.fp8.unknown_scales == (linear("weight_scale"),)
    assert report.layout == "nested"
    assert len(report.problems) == 2
    assert any(f"expected weight_scale_inv: {linear('weight_scale')}" in sentence for sentence in report.problems)


def test_a_scale_beside_plain_weights(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({linear("weight"): torch.zeros(512, 192).bfloat16()}))
    assert f"not stored as FP8, so perhaps applied already: {linear('weight')}" in problem(folder)


def test_fp8_without_a_word_in_the_configuration(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    assert "21 FP8 weights, but quantization_config.quant_method of config.json is None instead of 'fp8'" in problem(
        folder
    )


def test_fp8_in_the_configuration_only(folder: Path) -> None:
    def dequantize(tensors: Tensors) -> None:
        for key in list(tensors):
            if "scale" in key:
                del tensors[key]
            else:
                tensors[key] = tensors[key].bfloat16()

    edit_tensors(folder, dequantize)
    assert "is 'fp8', but no weight is stored as FP8" in problem(folder)


def test_fp8_where_none_belongs(folder: Path) -> None:
    key = "language_model.model.embed_tokens.weight"
    scale = {f"{key}_scale_inv": torch.tensor(1.0)}
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e4m3fn), **scale}))
    assert "FP8 outside the linears of the text layers: model.language_model.embed_tokens.weight" in problem(folder)


def test_shapes_that_the_configuration_contradicts(folder: Path) -> None:
    edit_config(folder, text_config__vocab_size=2000, text_config__num_hidden_layers=4)
    assert inspect_folder(folder).problems == (
        "config.json has vocab_size 2000, but the stored embedding has 2048 rows",
        "the tokenizer has 2048 ids, more than the vocab_size 2000 of config.json",
        "config.json has num_hidden_layers 4, but 3 text layers are stored",
    )


def test_the_tokenizer_of_a_larger_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    tekken = json.loads((folder / "tekken.json").read_text())
    tekken["config"]["default_vocab_size"] = 4096
    (folder / "tekken.json").write_text(json.dumps(tekken))
    assert problem(folder) == "the tokenizer has 4096 ids, more than the vocab_size 2048 of config.json"


def test_heads(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    assert "the head would be random" in problem(folder)
    edit_config(folder, tie_word_embeddings=None)  # transformers' default ties
    assert inspect_folder(folder).problems == ()
    head = {"language_model.lm_head.weight": torch.zeros(2048, 192).bfloat16()}
    edit_tensors(folder, lambda tensors: tensors.update(head))
    assert "a head is stored, but tie_word_embeddings of config.json is true" in problem(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 1.0, "mscale_all_dim": 0.0, "factor": 64.0},
        {"mscale": 0.7, "mscale_all_dim": 0.3},
        {"attention_factor": 1.25},
        {"factor": 1.0},
    ],
)
def test_attention_scaling_is_transformers_own(folder: Path, changes: dict[str, float]) -> None:
    edit_config(folder, **{f"text_config__rope_parameters__{key}": value for key, value in changes.items()})
    config = AutoConfig.from_pretrained(folder).text_config
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = inspect_folder(folder).rope
    assert math.isclose(rope.attention_scaling, expected, rel_tol=1e-9)
    assert (rope.kind, rope.theta, rope.original_tokens, rope.max_tokens) == ("yarn", 1e6, 16384, 262144)


def test_stale_rope(folder: Path) -> None:
    params = folder / "params.json"
    params.write_text(json.dumps({"yarn": {"apply_scale": False}}))
    assert inspect_folder(folder).problems == ()
    params.write_text(json.dumps({"yarn": {"apply_scale": True}}))
    assert "attention scaling of 1.00000, but yarn.apply_scale of params.json is true" in problem(folder)
    edit_config(folder, text_config__rope_parameters__mscale_all_dim=0.0)
    assert inspect_folder(folder).problems == ()
    params.write_text(json.dumps({"yarn": {"apply_scale": False}}))
    assert "of 1.27726, but yarn.apply_scale of params.json is false, which means a scaling of 1" in problem(folder)
    params.write_text(json.dumps({"dim": 192}))
    assert inspect_folder(folder).problems == ()


def test_rope_without_the_query_scale(folder: Path) -> None:
    edit_config(folder, text_config__rope_parameters__llama_4_scaling_beta=None)
    assert "no rope_parameters.llama_4_scaling_beta" in problem(folder)


def test_keys_of_no_layout(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"adapter.weight": torch.ones(2)}))
    report = inspect_folder(folder)
    assert report.layout is None
    assert report.num_parameters.keys() == {"unknown"}
    assert "without a place for 1: adapter.weight" in report.problems[0]


def test_the_same_weights_in_native_form_are_not_counted_twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_files(folder) == (folder / "model.safetensors",)
    assert inspect_folder(folder).num_files == 1
    (folder / "model.safetensors").unlink()
    with pytest.raises(LayoutError, match=r"native layout \(consolidated\.safetensors\)"):
        weight_files(folder)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_native_folder_tells_what_the_same_weights_in_hugging_face_form_tell(
    tmp_path: Path, tied: bool, num_shards: int
) -> None:
    write_fp8_folder(tmp_path / "stock", layout="identity", tie_word_embeddings=tied)
    write_native_folder(tmp_path / "native", tmp_path / "stock", num_shards=num_shards)
    stock, native = inspect_folder(tmp_path / "stock"), inspect_folder(tmp_path / "native")
    assert (native.layout, native.num_files, native.problems) == ("native", num_shards, ())
    assert native.head_stored is not tied
    same = dataclasses.replace(native, folder=stock.folder, layout=stock.layout, num_files=1)
    assert dataclasses.replace(same, num_tensors=stock.num_tensors, num_bytes=stock.num_bytes) == stock
    assert (same.num_tensors, same.num_bytes) == (stock.num_tensors, stock.num_bytes)
    edit = tmp_path / "native" / "params.json"
    edit.write_text(json.dumps({**json.loads(edit.read_text()), "n_layers": 3}))
    assert "num_hidden_layers 3, but 2 text layers are stored" in problem(tmp_path / "native")


def test_what_a_model_needs(made: Path) -> None:
    report = inspect_folder(made)
    num_parameters, num_fp8 = sum(report.num_parameters.values()), report.num_bytes["F8_E4M3"]
    memory = report.memory
    assert memory.bfloat16_bytes == 2 * num_parameters
    assert memory.fp8_bytes == report.num_bytes["F8_E4M3"] + report.num_bytes["BF16"] == 2 * num_parameters - num_fp8
    assert memory.full_float32_bytes == 16 * num_parameters


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, num_shards=2)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json: disagrees with the files about"):
        read_headers(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"^\S*model\.safetensors: "):
        inspect_folder(folder)


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        inspect_folder(folder / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(LayoutError, match=r"config\.json: not JSON"):
        inspect_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(LayoutError, match=r"config\.json: must hold an object, got list"):
        inspect_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(LayoutError, match=r"no config\.json"):
        inspect_folder(folder)


def test_a_tokenizer_file_of_another_kind(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LayoutError, match=r"tokenizer\.json: not a tokenizer\.json \(KeyError\('model'\)\)"):
        inspect_folder(folder)


def test_torch_is_not_needed(made: Path) -> None:
    code = (
        "import sys; from ostro.checkpoint.inspect import inspect_folder; "
        f"print(inspect_folder({str(made)!r}).layout, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "nested False\n"


def test_every_attribute_is_described() -> None:
    described = FolderReport.__doc__ or ""
    assert [name for name in FolderReport.__annotations__ if f"{name}: " not in described] == []

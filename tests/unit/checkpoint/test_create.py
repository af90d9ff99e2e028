"""Random weights folders: stock transformers loads them whole, and their numbers are what the format says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ostro.checkpoint.create import create_weights
from ostro.checkpoint.presets import LAYOUT_NAMES, PRECISIONS, SIZES, model_config
from ostro.errors import CheckpointError, OstroError, RecipeError
from ostro.models.layout import TEXT_LINEAR, recognise
from ostro.models.tokenizer import load_tokenizer
from tests.helpers.disk import full_disk

TINY: dict[str, Any] = {"size": "tiny", "vocab_size": 2048, "seed": 0}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def load(folder: Path, layout: str) -> PreTrainedModel:
    """Loads with stock transformers, which must find every key it wants and no other."""
    auto = AutoModelForCausalLM if layout == "text-only" else AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_transformers_loads_it_whole(tmp_path: Path, layout: str, precision: str) -> None:
    create_weights(tmp_path / "weights", layout=layout, precision=precision, **TINY)
    stored = stored_tensors(tmp_path / "weights")
    kind = recognise(stored)
    assert kind.name == layout
    assert sum("lm_head" in key for key in stored) == (layout != "nested")  # tied, so not stored
    model = load(tmp_path / "weights", layout)
    ids = torch.tensor([load_tokenizer(str(tmp_path / "weights")).encode(["the south wind"], 16)[0]])
    logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], TINY["vocab_size"])
    assert torch.isfinite(logits).all()
    assert logits.float().std() > 0.01
    num_fp8 = sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    assert num_fp8 == (7 * 3 if precision == "fp8" else 0)


def test_an_image_goes_through(tmp_path: Path) -> None:
    create_weights(tmp_path / "weights", layout="nested", precision="fp8", **TINY)
    model = load(tmp_path / "weights", "nested")
    ids = torch.tensor([[1, 10, 10, 12, 10, 10, 13, 1500]])  # 2 x 2 merged patches with a break after the first row
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).bfloat16()
    with_image = model(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[56, 56]])).logits
    assert torch.isfinite(with_image).all()
    brighter = model(input_ids=ids, pixel_values=pixels + 1, image_sizes=torch.tensor([[56, 56]])).logits
    assert not torch.equal(with_image, brighter)


def test_fp8_means_what_transformers_reads(tmp_path: Path) -> None:
    create_weights(tmp_path / "fp8", layout="identity", precision="fp8", **TINY)
    create_weights(tmp_path / "bf16", layout="identity", precision="bf16", **TINY)
    stored, plain = stored_tensors(tmp_path / "fp8"), stored_tensors(tmp_path / "bf16")
    loaded = load(tmp_path / "fp8", "identity").state_dict()
    for name, weight in plain.items():
        if TEXT_LINEAR.fullmatch(name):
            scale = stored[f"{name}_scale_inv"]
            assert (scale.shape, scale.dtype) == ((), torch.float32)
            assert stored[name.replace("weight", "activation_scale")].shape == ()
            real = stored[name].float() * scale
            assert torch.equal(loaded[name], real.bfloat16())
            # half a step of a 3-bit mantissa, or of the smallest subnormal; and bfloat16's own rounding
            assert ((real - weight.float()).abs() <= weight.float().abs() * (2**-4 + 2**-8) + scale * 2**-10).all()
        else:
            assert torch.equal(stored[name], weight)
    assert len(stored) == len(plain) + 2 * 7 * 3


def test_the_configuration_is_that_of_the_releases(tmp_path: Path) -> None:
    create_weights(tmp_path / "weights", layout="nested", precision="fp8", **TINY)
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "dequantize": False,
    }
    assert (config["model_type"], config["tie_word_embeddings"]) == ("mistral3", True)
    assert config["text_config"]["rope_parameters"]["original_max_position_embeddings"] == 16384
    text = model_config("3b", vocab_size=131072, tie_word_embeddings=True)["text_config"]
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [text[key] for key in (*shape, "head_dim")] == [3072, 9216, 26, 32, 8, 128]


def test_values_are_distributed_as_transformers_initialises(tmp_path: Path) -> None:
    create_weights(tmp_path / "weights", layout="identity", precision="bf16", **TINY)
    for name, tensor in stored_tensors(tmp_path / "weights").items():
        values = tensor.float()
        if tensor.dim() == 1:
            assert torch.equal(values, torch.ones_like(values)), name
        elif name.endswith("embed_tokens.weight"):
            assert not values[11].any()  # the pad token
            assert values.any(1).sum() == TINY["vocab_size"] - 1
        else:
            assert values.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(values.mean().item()) < 5 * 0.02 / values.numel() ** 0.5, name


def test_a_tensor_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    create_weights(tmp_path / "a", layout="identity", precision="fp8", **TINY)
    create_weights(tmp_path / "b", layout="nested", precision="fp8", max_shard_gib=0.0005, **TINY)
    create_weights(tmp_path / "c", layout="identity", precision="fp8", **{**TINY, "seed": 1})
    a, b, c = (stored_tensors(tmp_path / name) for name in "abc")
    nested = recognise(b)
    assert {nested.to_runtime(key) for key in b} == a.keys() - {"lm_head.weight"}
    for key, tensor in b.items():
        assert torch.equal(tensor.float(), a[nested.to_runtime(key)].float())
    matrices = [key for key, tensor in a.items() if tensor.dim() > 1]
    assert not any(torch.equal(a[key].view(torch.uint8), c[key].view(torch.uint8)) for key in matrices)
    first = [a[key].view(torch.uint8).flatten()[:64].tolist() for key in matrices]
    assert len({tuple(values) for values in first}) == len(matrices)


def test_shards(tmp_path: Path) -> None:
    create_weights(tmp_path / "weights", layout="nested", precision="fp8", max_shard_gib=0.0005, **TINY)
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())
    sizes = []
    for file in files:
        tensors = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert len(tensors) == 1 or sizes[-1] <= 0.0005 * 2**30
        assert {key for key, name in index["weight_map"].items() if name == file.name} == tensors.keys()
    assert index["metadata"]["total_size"] == sum(sizes)
    load(tmp_path / "weights", "nested")


@pytest.mark.parametrize(
    ("size", "num_text", "vocab_size"), [("tiny", 2.75e6, 8192), ("small", 19.3e6, 8192), ("3b", 3.43e9, 131072)]
)
def test_sizes(size: str, num_text: float, vocab_size: int) -> None:
    shapes, kv = SIZES[size]["text"], 2
    hidden, heads = shapes["hidden_size"], shapes["num_attention_heads"] + shapes["num_key_value_heads"]
    per_layer = kv * heads * shapes["head_dim"] * hidden + 3 * hidden * shapes["intermediate_size"]
    assert vocab_size * hidden + shapes["num_hidden_layers"] * per_layer == pytest.approx(num_text, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "huge"}, r"^size: must be one of tiny, scenes, small, 3b; got 'huge'"),
        ({"layout": "native"}, r"^layout: must be one of nested, identity, text-only; got 'native'"),
        ({"precision": "int4"}, r"^precision: must be one of fp8, bf16; got 'int4'"),
        ({"vocab_size": 1000}, r"^vocab_size: "),
    ],
)
def test_unknown_choices_leave_nothing(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create_weights(tmp_path / "weights", **{"layout": "nested", "precision": "fp8", **TINY, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"weights: exists already"):
        create_weights(folder, layout="nested", precision="fp8", **TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["weights", "mine.txt"]
    (folder / "mine.txt").unlink()
    create_weights(folder, layout="nested", precision="fp8", **TINY)
    assert (folder / "model.safetensors").is_file()


CREATE = """
import sys
from ostro.checkpoint.create import create_weights
settings = {"size": "small", "layout": "nested", "precision": "fp8", "vocab_size": 8192, "seed": 0}
create_weights(sys.argv[1], **settings, max_shard_gib=0.001)
"""


def test_a_kill_leaves_no_half_folder(tmp_path: Path) -> None:
    folder, partial = tmp_path / "weights", tmp_path / "weights.partial"
    with subprocess.Popen([sys.executable, "-c", CREATE, str(folder)]) as process:
        while not list(partial.glob("*.safetensors")):
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        process.kill()
    assert not folder.exists()
    create_weights(folder, layout="nested", precision="fp8", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        full_disk(max_file_bytes=1_000_000),
        pytest.raises(CheckpointError, match=r"weights: cannot be written \(.*[Ff]ile too large"),
    ):
        create_weights(tmp_path / "weights", layout="nested", precision="fp8", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OstroError, match=r"cannot be written"):
        create_weights(tmp_path / "file" / "weights", layout="nested", precision="fp8", **TINY)

"""An embedder that is split over ranks while it is read: each reads its rows, and together they are the model that one
process reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import Ministral3ForCausalLM, Ministral3ForSequenceClassification, MistralConfig, MistralForCausalLM

from ostro.checkpoint import reader
from ostro.errors import OstroError
from ostro.models.backbone import build_encoder_backbone
from ostro.models.packed import PackedTexts
from ostro.models.tokenizer import cut_tekken
from ostro.parallel.mesh import build_mesh
from ostro.parallel.options import ParallelOptions
from ostro.plan.live import LiveBytes
from ostro.train import embed
from ostro.train.recipe import EmbedRecipe
from tests.helpers.fp8_folder import edit_weights, write_fp8_folder
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import text_config, vlm_config

VOCAB = 1300
PROJECTION = "language_model.model.layers.1.mlp.up_proj.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _mistral() -> MistralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": VOCAB}
    return MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=None))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of every form, by name; scales of `fp8` lie in other files than their weights."""
    root = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    vlm = partial(vlm_config, vocab_size=VOCAB)
    write_fp8_folder(root / "fp8", config=vlm(), num_shards=3)
    write_fp8_folder(root / "fp8_blocks", layout="identity", scale_shape="block", config=vlm())
    write_fp8_folder(root / "vlm", layout="identity", config=vlm(tie_word_embeddings=False), fp8=False)
    write_fp8_folder(
        root / "fp8_text", layout="text_only", config=vlm(tie_word_embeddings=False), tie_word_embeddings=False
    )
    Ministral3ForCausalLM(text_config(vocab_size=VOCAB)).save_pretrained(root / "float32_text")
    _mistral().save_pretrained(root / "mistral")
    build_encoder_backbone(str(root / "float32_text"), "embedding", pooling="last").save_pretrained(root / "exported")
    tokenizer = root / "tokenizer"
    cut_tekken(VOCAB, tokenizer)
    forms = {folder.name: folder for folder in root.iterdir() if folder != tokenizer}
    for folder in forms.values():
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    assert len(forms) == 7
    return forms


def _recipe(folder: Path, dtype: str, **parallel: int) -> EmbedRecipe:
    settings: dict[str, Any] = {
        "kind": "embed",
        "output": "unused",
        "model": {"weights": str(folder), "dtype": dtype},
        "data": {"train": [{"path": "unused"}], "global_batch_queries": 8},
        "train": {"num_steps": 1},
        "parallel": parallel,
    }
    return EmbedRecipe.model_validate(settings)


def _build(group: dist.ProcessGroup, recipe: EmbedRecipe, **options: Any) -> Any:
    mesh = build_mesh(recipe.parallel, group.size(), "cpu")
    return embed.build_embedder(recipe, mesh, **options)[0]


def _load(group: dist.ProcessGroup, recipes: dict[str, EmbedRecipe]) -> dict[str, Any]:
    texts, results = PackedTexts.from_token_ids([[5, 1040, 1100], [7, 1200]]), {}
    for name, recipe in recipes.items():
        embedder = _build(group, recipe)
        whole = {
            weight: value.full_tensor() if isinstance(value, DTensor) else value
            for weight, value in embedder.backbone.state_dict().items()
        }
        with torch.no_grad():
            vectors = embedder(texts)
        results[name] = (whole, dict(embedder.backbone.named_buffers()), vectors, embedder.training)
    return results


@pytest.mark.filterwarnings("ignore:While redistributing from:UserWarning")
@pytest.mark.parametrize("parallel", [{"dp_shard": 3}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=str)
def test_the_embedder_does_not_depend_on_the_split(
    ranks: RankPool, folders: dict[str, Path], parallel: dict[str, int]
) -> None:
    cases = [(form, "bfloat16") for form in folders] + [("fp8", "float32"), ("float32_text", "float32")]
    recipes = {f"{form} {dtype}": _recipe(folders[form], dtype, **parallel) for form, dtype in cases}
    world_size = parallel.get("dp_shard", 1) * parallel.get("tp", 1)
    results = ranks.run(_load, recipes, world_size=world_size)
    for case, recipe in recipes.items():
        dtype = DTYPES[recipe.model.dtype]
        expected = build_encoder_backbone(recipe.model.weights, "embedding", pooling="avg", dtype=dtype)
        whole = embed.build_embedder(recipe)[0].eval()
        with torch.no_grad():
            vectors = whole(PackedTexts.from_token_ids([[5, 1040, 1100], [7, 1200]]))
        stored = torch.float32 if "dp_shard" in parallel else dtype  # what FSDP splits is its own master weight
        for weights, buffers, found, training in (result[case] for result in results):
            assert weights.keys() == expected.state_dict().keys()
            for name, weight in expected.state_dict().items():
                assert weights[name].dtype == stored
                assert torch.equal(weights[name], weight.to(stored)), (case, name)
            for name, buffer in expected.named_buffers():
                assert torch.equal(buffers[name], buffer), (case, name)
            # float32 sums in another order, bfloat16 roundings at other places
            torch.testing.assert_close(found, vectors, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
            assert training


class _Meter:
    """Bytes that were asked of the files, and the peak of tensors from the time that storage is made."""

    def __init__(self) -> None:
        self.num_bytes = self.peak = 0
        self._preadv, self._fill = reader.os.preadv, embed.fill_encoder  # type: ignore[attr-defined]

    def preadv(self, descriptor: int, buffers: Any, position: int) -> int:
        count: int = self._preadv(descriptor, buffers, position)
        self.num_bytes += count
        return count

    def fill(self, *args: Any, **options: Any) -> None:
        with LiveBytes() as live:
            self._fill(*args, **options)
        self.peak = live.peak

    def __enter__(self) -> _Meter:
        self._patches = [
            patch.object(reader.os, "preadv", self.preadv),  # type: ignore[attr-defined]
            patch.object(embed, "fill_encoder", self.fill),
        ]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._patches:
            one.stop()


def _measure(group: dist.ProcessGroup, recipe: EmbedRecipe, is_resumed: bool) -> tuple[int, int, int]:
    with _Meter() as meter:
        embedder = _build(group, recipe, is_resumed=is_resumed)
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in embedder.parameters()]
    return meter.num_bytes, meter.peak, sum(weight.nbytes for weight in local)


@pytest.mark.parametrize(("axis", "item_bytes"), [("dp_shard", 4), ("tp", 2)])
def test_a_rank_reads_and_holds_its_part_alone(
    ranks: RankPool, folders: dict[str, Path], axis: str, item_bytes: int
) -> None:
    recipe = _recipe(folders["vlm"], "bfloat16", **{axis: 2})
    tower = build_encoder_backbone(recipe.model.weights, "embedding", dtype=torch.bfloat16)
    norms = sum(weight.numel() for name, weight in tower.state_dict().items() if "norm" in name)
    by_columns = sum(weight.numel() for name, weight in tower.state_dict().items() if "o_proj" in name or "down" in name)
    num_weights = tower.num_parameters()
    largest = max(weight.numel() for weight in tower.parameters())
    for num_read, peak, held in ranks.run(_measure, recipe, False):
        own = num_weights // 2 if axis == "dp_shard" else (num_weights + norms) // 2
        assert held == item_bytes * own
        # of a column range whole rows are read: storage delivers them anyway
        assert num_read == 2 * (own if axis == "dp_shard" else own + by_columns // 2)
        assert peak <= 1.02 * held + item_bytes * largest
    for num_read, peak, held in ranks.run(_measure, recipe, True):
        assert num_read == 0
        assert peak <= 1.02 * held


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _classifier(folder: Path) -> None:
    Ministral3ForSequenceClassification(text_config(vocab_size=VOCAB)).save_pretrained(folder)


def _native(folder: Path) -> None:
    (folder / "params.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("language_model.model.norm.weight")),
        r"1 missing \(language_model\.norm\.weight\)",
        r"1 missing: model\.language_model\.norm\.weight",
    ),
    "unexpected": (
        lambda folder: edit_weights(folder, lambda weights: weights.update(extra=torch.ones(1))),
        r"1 unexpected \(extra\)",
        r"no layout covers all .* place for 1: extra",
    ),
    "shape": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({PROJECTION: weights[PROJECTION][:60].clone()})),
        r"1 of another shape \(language_model\.layers\.1.* \[60, 32\] for \[64, 32\]\)",
        r"1 of another shape: language_model\.model\.layers\.1.* \[60, 32\] for \[64, 32\]",
    ),
    "scale": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop(f"{PROJECTION}_scale_inv")),
        r"1 FP8 weights without weight_scale_inv",
        r"1 FP8 weights without weight_scale_inv",
    ),
    "config": (
        lambda folder: _edit_config(folder, quantization_config=None),
        r"14 unexpected .*weight_scale_inv",
        r"14 unexpected .*weight_scale_inv",
    ),
    "quantisation": (
        lambda folder: _edit_config(folder, quantization_config={"quant_method": "awq"}),
        r"quant_method must be 'fp8' or absent, got 'awq'",
        r"quant_method must be 'fp8' or absent, got 'awq'",
    ),
    "head": (_classifier, r"1 unexpected \(score\.weight\)", r"1 unexpected: score\.weight"),
    "native": (_native, "native layout", "native layout"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10]),
        r"model\.safetensors: has \d+ bytes",
        r"model\.safetensors: has \d+ bytes",
    ),
}


def _refused(group: dist.ProcessGroup, recipes: dict[str, EmbedRecipe]) -> dict[str, tuple[str, str, int]]:
    found = {}
    for name, recipe in recipes.items():
        with _Meter() as meter, pytest.raises(OstroError) as caught:
            _build(group, recipe)
        found[name] = (type(caught.value).__name__, str(caught.value), meter.peak)
    return found


def test_a_wrong_folder_is_refused_as_in_one_process_before_storage_is_made(
    ranks: RankPool, folders: dict[str, Path], tmp_path: Path
) -> None:
    recipes = {}
    for name, (change, _, _) in FAULTS.items():
        shutil.copytree(folders["fp8"], tmp_path / name)  # with its tokenizer
        write_fp8_folder(tmp_path / name, config=vlm_config(vocab_size=VOCAB))
        change(tmp_path / name)
        recipes[name] = _recipe(tmp_path / name, "bfloat16", dp_shard=2)
    [results, _] = ranks.run(_refused, recipes)
    for name, (_, alone, split) in FAULTS.items():
        with pytest.raises(OstroError, match=alone) as caught:
            embed.build_embedder(recipes[name])
        kind, message, peak = results[name]
        assert kind == type(caught.value).__name__, name
        assert peak == 0, name
        with pytest.raises(OstroError, match=split):
            raise OstroError(message)

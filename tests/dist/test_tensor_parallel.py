"""Layers split over ranks: what each rank holds and reads, and results equal to one process with whole layers.

Steps and runs of both kinds on meshes with `tp` are in `test_data_parallel`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ostro.checkpoint.create import create_weights
from ostro.checkpoint.load import load_vlm
from ostro.errors import RecipeError
from ostro.models.cpu_linear import OneDnnLinear, use_onednn
from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.parallel.apply import prepare, split_layers
from ostro.parallel.collectives import gather_whole
from ostro.parallel.gradients import gradient_norm
from ostro.parallel.mesh import Mesh, build_mesh, check_vision_fits
from ostro.parallel.options import ParallelOptions
from ostro.parallel.plans import TEXT_TOWER, VISION_LANGUAGE, VISION_SIDE, Plan
from ostro.parallel.vocabulary import SplitEmbedding
from tests.dist.test_data_parallel import _compare, _laid_out, _run, _steps, inputs, mixed_recipe, vlm_recipe
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import text_config, token_ids, vlm_config

__all__ = ["inputs"]  # a fixture

INPUT_IDS = torch.tensor(token_ids([24]))
# of 10 rows, `tp` leaves 5 and `dp_shard` of these 3 and 2
CONFIG: dict[str, Any] = {"intermediate_size": 10}


def _mesh(group: dist.ProcessGroup, **sizes: int) -> Mesh:
    return build_mesh(ParallelOptions(**sizes), group.size(), "cpu")


def _load(group: dist.ProcessGroup, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    model = load_vlm(folder, shard=partial(prepare, plan=VISION_LANGUAGE, mesh=_mesh(group, **sizes)))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        logits = model(input_ids=INPUT_IDS).logits
    return {
        "weights": {name: gather_whole(w) if isinstance(w, DTensor) else w for name, w in weights.items()},
        "shapes": {
            name: tuple(w.to_local().shape if isinstance(w, DTensor) else w.shape) for name, w in weights.items()
        },
        "is_tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "logits": logits,
    }


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 2, "dp_shard": 2}], ids=["tp", "tp-dp_shard"])
@pytest.mark.parametrize("layout", ["nested", "identity", "native"])
def test_each_rank_reads_its_part(ranks: RankPool, tmp_path: Path, layout: str, sizes: dict[str, int]) -> None:
    is_tied = layout == "nested"
    config = vlm_config(tie_word_embeddings=is_tied, **CONFIG)
    write_fp8_folder(tmp_path, layout="nested" if is_tied else "identity", tie_word_embeddings=is_tied, config=config)
    folder = tmp_path
    if layout == "native":
        folder = tmp_path / "native"
        write_native_folder(folder, tmp_path)
    expected = load_vlm(folder)
    results = ranks.run(_load, folder, sizes, world_size=2 * sizes.get("dp_shard", 1))
    for result in results:
        assert result["is_tied"] == is_tied
        for name, weight in expected.named_parameters():
            assert torch.equal(result["weights"][name], weight), name
        with torch.no_grad():
            logits = expected(input_ids=INPUT_IDS).logits
        # bfloat16 products summed over two ranks
        torch.testing.assert_close(result["logits"], logits, rtol=0.05, atol=0.05 * logits.abs().max().item())
    held = {
        name.rpartition("layers.0.")[2]: [result["shapes"][name] for result in results]
        for name in results[0]["shapes"]
        if "language_model" in name
    }
    split = "dp_shard" in sizes
    assert held["mlp.up_proj.weight"] == ([(3, 32), (3, 32), (2, 32), (2, 32)] if split else [(5, 32)] * 2)
    assert held["mlp.down_proj.weight"] == ([(16, 5)] * 4 if split else [(32, 5)] * 2)
    assert held["self_attn.k_proj.weight"] == ([(4, 32)] * 4 if split else [(8, 32)] * 2)
    assert held["input_layernorm.weight"] == ([(16,)] * 4 if split else [(32,)] * 2)
    assert held["model.language_model.embed_tokens.weight"] == ([(24, 32)] * 4 if split else [(48, 32)] * 2)


def _tower() -> Ministral3BidirectionalModel:
    torch.manual_seed(0)
    config = Ministral3BidirectionalConfig(**text_config(pad_token_id=60).to_dict())
    return Ministral3BidirectionalModel(config)


def _tower_gradients(group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Gradients of a tower whose linear layers are oneDNN's in one process, with padding tokens in the text."""
    model = _tower()
    use_onednn(model)
    if group is not None:
        split_layers(model, TEXT_TOWER, init_device_mesh("cpu", (group.size(),)))
        assert isinstance(model.layers[0].mlp.up_proj, OneDnnLinear)
    ids = INPUT_IDS.clone()
    ids[0, ::5] = 60
    ids[0, 1] = 12  # the row of the second rank that the padding token has on the first
    states = model(input_ids=ids).last_hidden_state
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {
        name: gather_whole(weight.grad) if isinstance(weight.grad, DTensor) else weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def test_a_padded_text_and_other_linear_layers(ranks: RankPool) -> None:
    expected = _tower_gradients(None)
    assert not expected["embed_tokens.weight"][60].any()
    assert expected["embed_tokens.weight"][12].any()
    for gradients in ranks.run(_tower_gradients):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            # float32 sums in another order
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def _num_sums(group: dist.ProcessGroup) -> int:
    model = _tower()
    split_layers(model, TEXT_TOWER, init_device_mesh("cpu", (group.size(),)))
    with CommDebugMode() as counted:
        model(input_ids=INPUT_IDS).last_hidden_state.sum().backward()
    assert counted.get_total_counts() == counted.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
    return counted.get_total_counts()


def test_what_a_layer_sends(ranks: RankPool) -> None:
    """Attention and MLP of each of two layers send one sum forward and one backward, the embedding one forward."""
    assert ranks.run(_num_sums) == [9, 9]


def _looked_up(group: dist.ProcessGroup, ids: torch.Tensor, padding: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.nn.Embedding(8, 3, padding)
    split = SplitEmbedding(8, 3, padding)
    mesh = init_device_mesh("cpu", (group.size(),))
    split.weight = torch.nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    rows = split(ids)
    torch.testing.assert_close(rows, whole(ids), rtol=0, atol=0)
    (rows * torch.arange(1, 4)).sum().backward()
    (whole(ids) * torch.arange(1, 4)).sum().backward()
    assert isinstance(split.weight.grad, DTensor)
    assert split.weight.grad.to_local().shape == (8 // group.size(), 3)
    assert whole.weight.grad is not None
    return gather_whole(split.weight.grad), whole.weight.grad


@pytest.mark.parametrize("padding", [None, 1, 6])
@pytest.mark.parametrize("world_size", [2, 4])
def test_an_embedding_is_looked_up_where_its_rows_are(ranks: RankPool, padding: int | None, world_size: int) -> None:
    ids = torch.tensor([[0, 7, 1, 6, 6], [2, 1, 3, 5, 4]])
    for split, whole in ranks.run(_looked_up, ids, padding, world_size=world_size):
        assert torch.equal(split, whole)


def _norms(group: dist.ProcessGroup) -> tuple[float, float]:
    """Of a gradient split along both axes, one along either, and a whole one."""
    mesh = _mesh(group, dp_shard=2, tp=2)
    assert mesh.devices is not None
    torch.manual_seed(0)
    wholes = [torch.randn(6, 4) for _ in range(4)]
    cuts: list[tuple[Any, Any]] = [
        (mesh.devices, [Shard(0), Shard(1)]),
        (mesh.along("dp_shard"), [Shard(0)]),
        (mesh.along("tp"), [Shard(1)]),
    ]
    split = [distribute_tensor(whole, *cut, src_data_rank=None) for whole, cut in zip(wholes, cuts, strict=False)]
    return gradient_norm([*split, wholes[-1]], mesh).item(), torch.cat(wholes).norm().item()


def test_the_norm_counts_every_entry_once(ranks: RankPool) -> None:
    results = ranks.run(_norms, world_size=4)
    assert len({norm for norm, _ in results}) == 1
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-6)


def _split_by(group: dist.ProcessGroup, plan: Plan) -> str:
    with pytest.raises(ValueError) as caught:
        split_layers(_tower(), plan, init_device_mesh("cpu", (group.size(),)))
    return str(caught.value)


def test_a_pattern_without_a_module_is_named(ranks: RankPool) -> None:
    for told in ranks.run(_split_by, {**TEXT_TOWER, r"layers\.\d+\.mlp\.gate": "outputs"}):
        assert told == r"layers\.\d+\.mlp\.gate: no module of Ministral3BidirectionalModel has such a name"


@pytest.mark.parametrize(
    ("freeze", "mesh"),
    [((), (1, 2, 2)), (("vision", "projector", "embeddings", "language_model"), (1, 1, 2))],
    ids=["all", "head"],
)
def test_a_head_of_its_own(
    ranks: RankPool, inputs: Path, tmp_path: Path, freeze: tuple[str, ...], mesh: tuple[int, int, int]
) -> None:
    weights = tmp_path / "weights"
    create_weights(weights, size="tiny", layout="identity", precision="bf16", vocab_size=1500, seed=0)
    model = {"weights": str(weights), "dtype": "float32", "freeze": freeze}
    recipe = vlm_recipe(inputs, tmp_path / "run", model=model)
    expected = _steps(None, recipe, 2)
    assert "lm_head.weight" in expected[1]
    results = ranks.run(_steps, _laid_out(recipe, *mesh), 2, world_size=mesh[1] * mesh[2])
    _compare(results, expected, is_split=True)


def test_a_split_that_the_model_does_not_have(ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    told, *silent = ranks.run(_run, _laid_out(vlm_recipe(inputs, tmp_path), 1, 1, 3), None, world_size=3)
    assert told.startswith("RecipeError: parallel.tp: must divide the model's num_key_value_heads, 2, got 3")
    assert silent == ["ToldElsewhere: rank 0 failed and tells why"] * 2


@pytest.mark.parametrize(
    ("freeze", "mesh"),
    [
        ((), (1, 1, 2)),
        (("vision",), (1, 1, 2)),
        (("embeddings", "language_model"), (1, 1, 2)),
        ((), (1, 2, 2)),
    ],
    ids=["all", "text", "vision", "all-dp_shard"],
)
def test_a_split_vision_tower(
    ranks: RankPool, inputs: Path, tmp_path: Path, freeze: tuple[str, ...], mesh: tuple[int, int, int]
) -> None:
    """On several images, on text alone; its activations computed again where all of it trains."""
    recipe = mixed_recipe(inputs, tmp_path)
    model = recipe.model.model_copy(update={"freeze": freeze, "activation_checkpointing": not freeze})
    recipe = recipe.model_copy(update={"model": model})
    expected = _steps(None, recipe, 2)
    assert [row["num_images"] for row in expected[0]] == [4, 0]
    laid_out = _laid_out(recipe, *mesh)
    parallel = laid_out.parallel.model_copy(update={"tp_vision": True})
    split = laid_out.model_copy(update={"parallel": parallel})
    _compare(ranks.run(_steps, split, 2, world_size=mesh[1] * mesh[2]), expected, is_split=True)


def _held_by_vision(group: dist.ProcessGroup, folder: Path) -> dict[str, tuple[int, ...]]:
    plan = {**VISION_LANGUAGE, **VISION_SIDE}
    model = load_vlm(folder, shard=partial(prepare, plan=plan, mesh=_mesh(group, tp=2)))
    assert model.model.vision_tower.transformer.layers[0].attention.num_heads == 1
    weights = {name: weight for name, weight in model.named_parameters() if "language_model" not in name}
    return {name: tuple(w.to_local().shape if isinstance(w, DTensor) else w.shape) for name, w in weights.items()}


def test_what_a_rank_holds_of_a_split_vision_tower(ranks: RankPool, tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, layout="nested", tie_word_embeddings=True)
    expected = {name: tuple(weight.shape) for name, weight in load_vlm(tmp_path).named_parameters()}
    for held in ranks.run(_held_by_vision, tmp_path):
        split = {name.rpartition("layers.1.")[2]: held[name] for name in held if held[name] != expected[name]}
        assert {name: shape for name, shape in split.items() if "layers.0" not in name} == {
            **{f"attention.{role}_proj.weight": (16, 32) for role in "qkv"},
            "attention.o_proj.weight": (32, 16),
            **{f"feed_forward.{role}_proj.weight": (24, 32) for role in ("gate", "up")},
            "feed_forward.down_proj.weight": (32, 24),
            "model.multi_modal_projector.linear_1.weight": (16, 32),
            "model.multi_modal_projector.linear_2.weight": (32, 16),
        }


def test_a_vision_tower_that_does_not_divide() -> None:
    config = vlm_config()  # its vision tower has 2 heads
    with pytest.raises(
        RecipeError, match=r"parallel.tp_vision: parallel.tp must divide the vision tower's num_attention_"
    ):
        check_vision_fits({"tp": 4}, config)
    check_vision_fits({"tp": 2}, config)

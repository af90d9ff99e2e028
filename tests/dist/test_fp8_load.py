"""A folder read by several ranks: each holds its rows, and together they are the model that one process reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from ostro.checkpoint import reader as reader_module
from ostro.checkpoint.load import load_vlm
from ostro.checkpoint.reader import Fp8StorageReader
from ostro.models.fp8_adapter import Mistral3FP8StateDictAdapter
from ostro.parallel.apply import shard_parameters
from tests.helpers.fp8_folder import write_fp8_folder
from tests.helpers.native_folder import write_native_folder
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import token_ids, vlm_config

INPUT_IDS = torch.tensor(token_ids([24]))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def _load(group: dist.ProcessGroup, folder: Path) -> dict[str, Any]:
    model = load_vlm(folder, mesh=init_device_mesh("cpu", (group.size(),)))
    parameters = dict(model.named_parameters())
    adapter = model.state_dict_adapter
    return {
        "weights": {name: parameter.detach().full_tensor() for name, parameter in parameters.items()},
        "rows": {name: len(parameter.to_local()) for name, parameter in parameters.items()},
        "buffers": dict(model.named_buffers()),
        "logits": _logits(model),
        "adapter": (adapter.layout.name, sorted(adapter.scales), sorted(adapter.activation_scales)),
    }


@pytest.fixture(params=["nested", "identity", "native", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # 5 rows over 4 ranks are 2, 2, 1, 0; 32 rows over 3 are 11, 11, 10, which splits heads of 8 rows
    config = vlm_config(tie_word_embeddings=request.param == "nested", intermediate_size=5)
    layout = "nested" if request.param == "nested" else "identity"
    shards = 1 if request.param == "native" else 3  # then scales lie in other files than their weights
    write_fp8_folder(
        tmp_path,
        layout=layout,
        tie_word_embeddings=config.tie_word_embeddings,
        config=config,
        num_shards=shards,
        fp8=request.param != "bfloat16",
    )
    if request.param == "native":
        write_native_folder(tmp_path / "native", tmp_path, num_shards=2)
        return tmp_path / "native"
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_model_does_not_depend_on_the_number_of_ranks(ranks: RankPool, folder: Path, world_size: int) -> None:
    expected = load_vlm(folder)
    results = ranks.run(_load, folder, world_size=world_size)
    weights = dict(expected.named_parameters())
    for result in results:
        assert result["weights"].keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(result["weights"][name], weight), name
        for name, buffer in expected.named_buffers():
            assert torch.equal(result["buffers"][name], buffer), name
        assert torch.equal(result["logits"], _logits(expected))
        adapter = expected.state_dict_adapter
        assert result["adapter"] == (adapter.layout.name, sorted(adapter.scales), sorted(adapter.activation_scales))
    rows = [result["rows"]["model.language_model.layers.0.mlp.up_proj.weight"] for result in results]
    assert rows == {1: [5], 2: [3, 2], 3: [2, 2, 1], 4: [2, 2, 1, 0]}[world_size]


def _read_columns(group: dist.ProcessGroup, folder: Path, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", shape)
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full(vlm_config())
    reader = Fp8StorageReader(folder, head_dim=adapter.head_dim)
    state = {
        name: zeros(size, dtype=torch.bfloat16, device_mesh=mesh, placements=[Shard(0), Shard(1)])
        for name, size in reader.shapes.items()
        if len(size) > 1
    }
    # several pieces for each tensor, of which few begin or end with the rows of this rank
    with patch.object(reader_module, "_CPU_PIECE_BYTES", 200):
        load(dict(state), storage_reader=reader, no_dist=True)
    return {name: tensor.full_tensor() for name, tensor in state.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("scale_shape", ["tensor", "row", "block", "native"])
def test_columns_are_cut_from_whole_rows(ranks: RankPool, tmp_path: Path, scale_shape: str) -> None:
    form = scale_shape if scale_shape in ("row", "block") else ()
    write_fp8_folder(tmp_path, layout="identity", scale_shape=form)
    expected = dict(load_vlm(tmp_path).named_parameters())
    folder = tmp_path
    if scale_shape == "native":
        folder = tmp_path / "native"
        write_native_folder(folder, tmp_path)
    for result in ranks.run(_read_columns, folder, (2, 2), world_size=4):
        assert len(result) > 20
        for name, weight in result.items():
            assert torch.equal(weight, expected[name]), name


def _gradients(group: dist.ProcessGroup | None, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    mesh = init_device_mesh("cpu", (group.size(),)) if group else None
    model = load_vlm(folder, mesh=mesh, dtype=torch.float32).train()
    loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
    }


def test_gradients_of_a_split_model_are_those_of_the_whole(ranks: RankPool, tmp_path: Path) -> None:
    write_fp8_folder(tmp_path, config=vlm_config(intermediate_size=5))
    loss, expected = _gradients(None, tmp_path)
    for rank_loss, gradients in ranks.run(_gradients, tmp_path, world_size=4):
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            # the mean over four ranks of the same gradient: float32 sums
            torch.testing.assert_close(
                gradients[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item() + 1e-12
            )


def _refused(group: dist.ProcessGroup) -> list[str]:
    messages = []
    for module, shape in ((torch.nn.Linear(2, 2), (2,)), (torch.nn.Linear(2, 2), (1, 1, 2))):
        with pytest.raises(ValueError) as caught:
            shard_parameters(module, init_device_mesh("cpu", shape))
        messages.append(str(caught.value))
    return messages


def test_what_cannot_be_split_is_named(ranks: RankPool) -> None:
    for no_layer, three_axes in ranks.run(_refused):
        assert no_layer == "Linear: has no layer of transformers"
        assert three_axes.startswith("mesh: must have one or two axes, got 3")

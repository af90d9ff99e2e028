"""Compiled layers: the gradients of plain ones, in one process and on a mesh, and a bounded number of compilations.

Most tests go through all of torch.compile but its code generator, which takes minutes on a busy machine; the `slow` one
takes it too.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from ostro.errors import RecipeError
from ostro.models.packed import PackedTexts, forward_packed, use_packed_attention
from ostro.parallel import apply
from ostro.parallel.mesh import AXES, Mesh
from ostro.parallel.options import ParallelOptions
from ostro.train import vlm
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from tests.dist.test_data_parallel import Steps, _compare, _steps, embed_recipe, inputs, mixed_recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import token_ids
from tests.unit.models.test_packed import tower

__all__ = ["inputs"]  # a fixture

# torch's own, while it looks at the inputs of what it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# samples of a row: their number and the tokens in all change
ROWS = [[9, 4], [17], [3, 12, 30], [8, 8, 8, 8], [1], [5, 6, 7, 8, 9, 10], [2, 2, 2, 2, 2, 2, 2, 2, 2]]


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the code generator, and with nothing compiled before or after."""
    torch._dynamo.reset()
    monkeypatch.setattr(apply, "_COMPILER", "aot_eager")
    apply._check_compiler("aot_eager")
    counters.clear()
    yield
    torch._dynamo.reset()


def _import_generator() -> None:
    """The code generator uses what torch itself has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")


def _check_rows(*, recompute: bool) -> list[int]:
    """Compares a compiled and a plain model row by row; how often was compiled after each."""
    plain, compiled = tower().train(), tower().train()
    if recompute:
        apply.checkpoint_activations(compiled)
    apply.compile_layers(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    graphs = []
    for lengths in ROWS:
        for model in (plain, compiled):
            use_packed_attention(model)
            model.zero_grad()
            states = forward_packed(model, PackedTexts.from_token_ids(token_ids(lengths)))
            (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
        expected = [weight.grad for weight in plain.parameters() if weight.grad is not None]
        largest = max(gradient.abs().max().item() for gradient in expected)
        for weight, gradient in zip(compiled.parameters(), expected, strict=True):
            # float32 sums in another order; of a single token, queries and keys have rounding noise for a gradient
            atol = max(1e-5 * gradient.abs().max().item(), 1e-6 * largest)
            torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=atol)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("recompute", [False, True])
def test_rows_of_other_lengths_compile_nothing_new(no_code: None, recompute: bool) -> None:
    graphs = _check_rows(recompute=recompute)
    assert graphs[0] == 2  # norm and MLP, once for all layers
    assert graphs[3] == graphs[0]
    assert graphs[-1] == 4  # a row of a single token is another form


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generated_code_gives_the_same_gradients() -> None:
    _import_generator()
    _check_rows(recompute=False)


def _compiled_steps(group: dist.ProcessGroup | None, recipe: EmbedRecipe | VlmRecipe, num_steps: int) -> Steps:
    apply._COMPILER = "aot_eager"
    try:
        torch._dynamo.reset()
        counters.clear()
        model = recipe.model.model_copy(update={"compile": True})
        results = _steps(group, recipe.model_copy(update={"model": model}), num_steps)
        # norm and MLP of both towers, behind images and behind text alone
        assert 0 < counters["stats"]["unique_graphs"] < 10
        return results
    finally:
        apply._COMPILER = "inductor"


@pytest.mark.parametrize(
    ("kind", "parallel", "recompute"),
    [
        ("vlm", {"dp_shard": 2}, True),
        ("vlm", {"tp": 2}, True),
        ("vlm", {"pp": 2}, False),
        ("embed", {"dp_shard": 2}, False),
    ],
    ids=str,
)
def test_compiled_steps_are_those_of_one_plain_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, kind: str, parallel: dict[str, int], recompute: bool
) -> None:
    recipe = mixed_recipe(inputs, tmp_path) if kind == "vlm" else embed_recipe(inputs, tmp_path)
    expected = _steps(None, recipe, 2)
    model = recipe.model.model_copy(update={"activation_checkpointing": recompute})
    recipe = recipe.model_copy(update={"parallel": ParallelOptions(**parallel), "model": model})
    results = ranks.run(_compiled_steps, recipe, 2)
    if "pp" in parallel:  # each stage has its own weights
        for rows, weights, moments in results:
            _compare([(rows, weights, moments)], _of_stage(expected, set(weights)), is_split=True)
    else:
        _compare(results, expected, is_split=True)


def _of_stage(steps: Steps, names: set[str]) -> Steps:
    rows, weights, moments = steps
    return rows, {name: weights[name] for name in names}, {name: moments[name] for name in names}


def test_only_a_model_that_trains_is_compiled(no_code: None, inputs: Path, tmp_path: Path) -> None:
    """What is exported needs no compiler."""
    recipe = mixed_recipe(inputs, tmp_path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"compile": True})})
    num_compiled = [
        sum(module._compiled_call_impl is not None for module in vlm.build_model(recipe, mesh)[0].modules())
        for mesh in (None, Mesh(dict.fromkeys(AXES, 1)))
    ]
    assert num_compiled[0] == 0
    assert num_compiled[1] > 0


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _import_generator()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    apply._check_compiler.cache_clear()
    torch._dynamo.reset()
    with pytest.raises(
        RecipeError, match=r"model\.compile: torch cannot compile for cpu here \(.*no-such-compiler.*set"
    ):
        apply.compile_layers(tower())


def test_layers_without_such_parts_are_refused(no_code: None) -> None:
    model = tower()
    for layer in model.layers:
        layer.block = layer.mlp
        del layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    with pytest.raises(
        ValueError, match=r"Ministral3DecoderLayer: has none of the parts to compile \(input_layernorm, "
    ):
        apply.compile_layers(model)

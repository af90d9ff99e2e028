"""oneDNN linears give what plain ones give, forward and backward, under the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostro.models.cpu_linear import OneDnnLinear, onednn_is_faster, use_onednn
from ostro.models.embedder import Embedder
from ostro.models.packed import PackedTexts
from tests.helpers.tiny import token_ids
from tests.unit.models.test_packed import LENGTHS, tower


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 3, 7), (0, 7)])
def test_product_and_gradients_against_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(7, 4, bias=False))
    ours = torch.nn.Sequential(torch.nn.Linear(7, 4, bias=False))
    ours[0].weight = torch.nn.Parameter(plain[0].weight.detach().clone())
    plain.double()
    use_onednn(ours)
    assert type(ours[0]) is OneDnnLinear
    states = torch.randn(shape, requires_grad=True)
    exact = states.detach().double().requires_grad_()
    got, expected = ours(states), plain(exact)
    got.square().sum().backward()
    expected.square().sum().backward()
    for one, truth in ((got, expected), (states.grad, exact.grad), (ours[0].weight.grad, plain[0].weight.grad)):
        torch.testing.assert_close(one.double(), truth, atol=1e-5, rtol=1e-5)


def test_weights_are_shared_and_keep_their_names_and_biased_layers_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    weight, names = model[0].weight, list(model.state_dict())
    use_onednn(model)
    assert model[0].weight is weight
    assert list(model.state_dict()) == names
    assert type(model[1]) is torch.nn.Linear


def test_other_dtypes_take_the_plain_product() -> None:
    layer = OneDnnLinear(4, 4, bias=False).bfloat16()
    states = torch.randn(3, 4).bfloat16()
    assert torch.equal(layer(states), torch.nn.functional.linear(states, layer.weight))


@pytest.mark.parametrize(
    ("cpu_facts", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", False),
        (None, False),
    ],
)
def test_the_maker_of_the_processor_decides(tmp_path: Path, cpu_facts: str | None, expected: bool) -> None:
    file = tmp_path / "cpuinfo"
    if cpu_facts is not None:
        file.write_text(cpu_facts, encoding="utf-8")
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert onednn_is_faster(file) is (expected and libraries)


def test_an_embedder_gives_the_same_vectors_with_either_library() -> None:
    packed = PackedTexts.from_token_ids(token_ids(LENGTHS))
    embedder, low = Embedder(tower()), Embedder(tower().bfloat16())
    assert any(isinstance(module, OneDnnLinear) for module in embedder.modules()) is onednn_is_faster()
    assert not any(isinstance(module, OneDnnLinear) for module in low.modules())
    plain = Embedder(tower())
    for name, module in list(plain.named_modules()):
        if isinstance(module, OneDnnLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear)
    use_onednn(embedder)
    torch.testing.assert_close(embedder(packed), plain(packed), atol=1e-5, rtol=0)


def test_a_compiler_sees_the_plain_layer() -> None:
    layer = OneDnnLinear(4, 4, bias=False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    rows = torch.randn(3, 4)
    torch.testing.assert_close(compiled(rows), torch.nn.functional.linear(rows, layer.weight))

"""oneDNN linears give what plain ones give, forward and backward, under the same names."""

from __future__ import annotations

import pytest
import torch

from ostro.models.cpu_linear import OneDnnLinear, use_onednn
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


def test_a_float32_embedder_uses_them_and_gives_the_same_vectors() -> None:
    packed = PackedTexts.from_token_ids(token_ids(LENGTHS))
    embedder = Embedder(tower())
    assert any(isinstance(module, OneDnnLinear) for module in embedder.modules())
    low = Embedder(tower().bfloat16())
    assert not any(isinstance(module, OneDnnLinear) for module in low.modules())
    plain = tower()
    reference = Embedder(plain)
    for name, module in list(plain.named_modules()):
        if isinstance(module, OneDnnLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear)
    torch.testing.assert_close(embedder(packed), reference(packed), atol=1e-5, rtol=0)

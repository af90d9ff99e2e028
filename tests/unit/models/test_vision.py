"""The per-image vision tower gives what transformers' joint one gives: states, gradients, outputs asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Mistral3Model
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

from ostro.models.packed import PACKED_ATTENTION
from ostro.models.vision import PerImageMistral3Model, PerImagePixtralModel
from ostro.parallel.apply import checkpoint_activations
from tests.helpers.tiny import vlm_config

SIZES = {
    "one": [(56, 84)],
    "equal": [(56, 56)] * 4,
    "mixed": [(28, 112), (84, 56), (28, 112), (84, 56), (84, 56)],
    "smallest": [(28, 28)],
    "not whole patches": [(41, 90), (60, 29)],
}


def images(sizes: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Random pixels `[N, 3, height, width]`, padding included: what lies there must not matter."""
    shape = (len(sizes), 3, max(size[0] for size in sizes), max(size[1] for size in sizes))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def towers() -> tuple[PixtralVisionModel, PerImagePixtralModel]:
    """Transformers' tower and ours, with equal weights."""
    torch.manual_seed(0)
    stock = PixtralVisionModel(vlm_config().vision_config).eval()
    torch.manual_seed(0)
    return stock, PerImagePixtralModel.adopt(PixtralVisionModel(vlm_config().vision_config)).eval()


def models(**overrides: Any) -> tuple[Mistral3Model, PerImageMistral3Model]:
    """Both whole models, with equal weights."""
    made = []
    for model_class in (Mistral3Model, PerImageMistral3Model):
        config = vlm_config()
        for name, value in overrides.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        made.append(model_class(config).eval())
    return made[0], made[1]


class AttentionShapes(TorchFunctionMode):
    """Records the query shapes of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_states_and_gradients_equal_the_joint_tower(sizes: list[tuple[int, int]]) -> None:
    results = []
    for tower in towers():
        pixels = images(sizes).requires_grad_()
        output = tower(pixels, image_sizes=torch.tensor(sizes))
        target = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(1))
        (output.last_hidden_state * target).sum().backward()
        gradients = {name: weight.grad for name, weight in tower.named_parameters()}
        results.append((output.last_hidden_state.detach(), {**gradients, "pixels": pixels.grad}))
    (expected, expected_gradients), (got, got_gradients) = results
    # float32 rounding of sums taken in another order; states are of order 1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, reference in expected_gradients.items():
        torch.testing.assert_close(got_gradients[name], reference, atol=1e-5 * reference.abs().max().item(), rtol=0)


def test_names_of_weights_are_those_of_the_joint_tower() -> None:
    stock, ours = towers()
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours.config._attn_implementation == PACKED_ATTENTION


def test_without_image_sizes_images_fill_the_batch() -> None:
    stock, ours = towers()
    pixels = images(SIZES["equal"])
    torch.testing.assert_close(ours(pixels)[0], stock(pixels)[0], atol=1e-5, rtol=0)


def test_neighbours_of_equal_size_share_an_attention_call() -> None:
    _, ours = towers()
    for name, expected in (("equal", [(4, 16)]), ("mixed", [(1, 16), (1, 24), (1, 16), (2, 24)])):
        with AttentionShapes() as seen:
            ours(images(SIZES[name]), image_sizes=SIZES[name])
        assert [(shape[0], shape[2]) for shape in seen.shapes] == expected * 2  # two layers


def test_states_of_all_layers_on_request() -> None:
    stock, ours = towers()
    pixels, sizes = images(SIZES["mixed"]), SIZES["mixed"]
    expected, got = (tower(pixels, image_sizes=sizes, output_hidden_states=True) for tower in (stock, ours))
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for ours_layer, stock_layer in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours_layer, stock_layer, atol=1e-5, rtol=0)
    assert ours(pixels, image_sizes=sizes).hidden_states is None
    assert isinstance(ours(pixels, image_sizes=sizes, return_dict=False), tuple)


def test_attention_weights_with_eager_attention() -> None:
    stock, ours = towers()
    pixels, sizes = images(SIZES["mixed"]), SIZES["mixed"]
    for tower in (stock, ours):
        tower.set_attn_implementation("eager")
    expected, got = (tower(pixels, image_sizes=sizes, output_attentions=True) for tower in (stock, ours))
    torch.testing.assert_close(got.attentions, expected.attentions, atol=0, rtol=0)


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        _, tower = towers()
        tower.train()
        if checkpointing:
            checkpoint_activations(tower)
        tower(images(SIZES["mixed"]), image_sizes=SIZES["mixed"])[0].square().sum().backward()
        gradients.append({name: weight.grad for name, weight in tower.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_image_features_equal_stock(layer: int) -> None:
    stock, ours = models(vision_feature_layer=layer)
    pixels, sizes = images(SIZES["mixed"]), torch.tensor(SIZES["mixed"])
    if layer == 0:  # transformers takes the index 0 for False, and keeps no states
        expected = stock.get_image_features(pixels, sizes, output_hidden_states=True).pooler_output
    else:
        expected = stock.get_image_features(pixels, sizes).pooler_output
    got = ours.get_image_features(pixels, sizes).pooler_output
    assert [len(image) for image in got] == [4, 6, 4, 6, 6]
    for ours_image, stock_image in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_image, stock_image, atol=1e-5, rtol=0)


def test_one_image_of_one_token() -> None:
    stock, ours = models()
    pixels, sizes = images([(28, 28)]), torch.tensor([(28, 28)])
    [feature] = ours.get_image_features(pixels, sizes).pooler_output
    # transformers splits this one along the wrong dim when it is alone, so here it comes with a second image
    two = images([(28, 28), (28, 56)], seed=2)
    two[0, :, :28, :28] = pixels[0]
    expected = stock.get_image_features(two, torch.tensor([(28, 28), (28, 56)])).pooler_output[0]
    torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)


def test_only_the_last_states_are_kept_for_the_text() -> None:
    _, ours = models()
    assert ours.get_image_features(images(SIZES["one"]), SIZES["one"]).hidden_states is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(56, 84), (13, 56)], r"image_sizes\[1\]: must be from 14 x 14"),
        ([(56, 84), (56, 98)], r"image_sizes\[1\]: .* to 56 x 84 \(pixel_values\), got 56 x 98"),
        ([(56, 84)], "image_sizes: one for each of 2 images, got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: list[tuple[int, int]], message: str) -> None:
    _, ours = towers()
    with pytest.raises(ValueError, match=message):
        ours(images([(56, 84)] * 2), image_sizes=sizes)

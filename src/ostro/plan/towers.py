"""What the layers of a model hold for the backward pass, measured on layers without data.

How many layers a rank has and what else it holds is left to `memory`. The idea: the model's own code runs forward and
backward on the meta device, with one layer and with two, while every tensor that lives is counted. The difference is a
layer, exactly as autograd keeps it: in its precision, with its parts frozen, with or without activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ostro.models.packed import PACKED_MASK, use_packed_attention
from ostro.parallel.apply import checkpoint_activations
from ostro.plan.attention import counted_attention
from ostro.plan.live import LiveBytes
from ostro.plan.shapes import Settings, build
from ostro.train.precision import MasterWeights


@dataclass(frozen=True)
class Tower:
    """Bytes of a stack of layers in one micro-batch.

    Attributes:
        fixed: Kept for the backward pass, whatever the number of layers.
        per_layer: Kept for each layer.
        forward: Most that the forward pass holds above what is kept at its end.
        backward: Most that the backward pass holds above what was kept.
    """

    fixed: int = 0
    per_layer: int = 0
    forward: int = 0
    backward: int = 0

    def kept(self, num_layers: int) -> int:
        """Bytes kept by so many layers."""
        return self.fixed + num_layers * self.per_layer


def text_tower(settings: Settings, *, tp: int, is_split: bool, has_gradient: bool, has_norm: bool) -> Tower:
    """Text layers, and the final norm, on a row of packed tokens.

    Args:
        settings: Of the run.
        tp: Ranks that split a layer.
        is_split: Whether weights are split over ranks: a layer's gradients are then held until all of them are there.
        has_gradient: Whether what comes before them wants one.
        has_norm: Whether the norm comes after them; else another stage of a pipeline.
    """

    def measure(num_layers: int) -> tuple[int, int, int]:
        model: Any = build(settings, tp=tp, num_layers=num_layers)
        text = model if settings.is_embedder else model.model.language_model
        row = settings.num_tokens
        states = torch.empty(1, row, settings.text_config.hidden_size, dtype=settings.dtype, device="meta")
        states.requires_grad_(has_gradient)
        if not has_norm:
            text.norm = torch.nn.Identity()
        inputs: dict[str, Any] = {
            "inputs_embeds": states,
            "position_ids": torch.empty(1, row, dtype=torch.int64, device="meta"),
            "packed_offsets": torch.empty(2, dtype=torch.int32, device="meta"),
        }

        def forward() -> torch.Tensor:
            output: torch.Tensor = text(
                **inputs, attention_mask=PACKED_MASK, use_cache=False, packed_lengths=(row,)
            ).last_hidden_state
            return output

        return _measure(text, text, tuple(inputs.values()), forward, settings, is_split=is_split)

    return _per_layer(measure)


def vision_tower(settings: Settings, *, tp: int, is_split: bool) -> Tower:
    """The vision layers, patch embedding and projector on the images of one micro-batch.

    Args:
        settings: Of the run.
        tp: Ranks that split a layer, with `tp_vision`.
        is_split: As for the text.
    """
    if not settings.num_patches:
        return Tower()

    def measure(num_layers: int) -> tuple[int, int, int]:
        model: Any = build(settings, tp=tp, num_layers=num_layers)
        merge, patch = model.config.spatial_merge_size, model.config.vision_config.patch_size
        size = (merge * patch, settings.num_patches // merge * patch)
        pixels = torch.empty(1, model.config.vision_config.num_channels, *size, device="meta")

        def forward() -> torch.Tensor:
            output: torch.Tensor = model.model.get_image_features(pixels, [size]).pooler_output[0]
            return output

        inner = torch.nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
        return _measure(inner, model, (pixels,), forward, settings, is_split=is_split)

    return _per_layer(measure)


def _per_layer(measure: Callable[[int], tuple[int, int, int]]) -> Tower:
    (forward, one, backward), (_, two, _) = measure(1), measure(2)
    return Tower(fixed=2 * one - two, per_layer=two - one, forward=forward, backward=backward)


def _measure(
    module: torch.nn.Module,
    owner: PreTrainedModel,
    inputs: Sequence[torch.Tensor],
    forward: Callable[[], torch.Tensor],
    settings: Settings,
    *,
    is_split: bool,
) -> tuple[int, int, int]:
    """Peak of the forward pass over what is kept, what is kept, peak of the backward pass over that."""
    use_packed_attention(owner)
    if settings.recompute:
        checkpoint_activations(module)
    masters: dict[str, torch.Tensor] = {}
    if not is_split:
        # gradients of earlier micro-batches are there, and those of this one go to them at once
        masters.update(MasterWeights(module).named_parameters())
        for weight in masters.values():
            weight.grad = torch.zeros_like(weight)
    with counted_attention(settings.device), LiveBytes() as live:
        live.add([*module.parameters(), *module.buffers(), *inputs, *masters.values()])
        live.add([weight.grad for weight in masters.values()])
        before = live.restart()
        output = forward()
        forward_peak, kept = live.peak, live.restart()
        if output.requires_grad:
            output.backward(torch.empty_like(output))
        return forward_peak - kept, kept - before, live.peak - kept

"""The Pixtral vision tower with every image on its own: time and memory grow with the number of images, not its square.

Text is left to `mistral3_vlm`, attention itself to `packed`. The idea: transformers' tower lays the patches of all
images end to end, pads none, and keeps images apart with a `[P, P]` mask over all patches, so 64 images cost 64 times
the scores of one by one. Patches are packed tokens, though: here the same layers run on the same row of patches, with
the packed attention function told where each image ends. Results and gradients differ from transformers' by float32
rounding only; names of modules and weights are the same.

Only patches that an image has are embedded: a batch pads small images to the largest one's size, and a convolution over
`pixel_values` would work on that padding too.

Shapes: N images, P patches in all, C channels, p patch size in pixels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Mistral3Config, Mistral3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ostro.models.packed import PACKED_ATTENTION, packed_offsets, use_packed_attention

ImageSizes = torch.Tensor | Sequence[Sequence[int]]
"""Height and width in pixels of each of N images: `[N, 2]`, or pairs."""


class PerImagePixtralModel(PixtralVisionModel):
    """Pixtral that attends within each image.

    Another attention function than `PACKED_ATTENTION`, set with `set_attn_implementation`, gives transformers' own
    forward back: `eager` for attention weights, for instance.
    """

    @classmethod
    def adopt(cls, tower: PixtralVisionModel) -> PerImagePixtralModel:
        """A per-image tower of the very modules of `tower`, which is not to be used any more.

        Args:
            tower: transformers' own. Where its attention function is `sdpa`, the default, the packed one takes its
                place.
        """
        with torch.device("meta"):
            adopted = cls(tower.config)
        for name, module in tower.named_children():
            setattr(adopted, name, module)
        if tower.config._attn_implementation == "sdpa":
            use_packed_attention(adopted)
        return adopted

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: ImageSizes | None = None, **kwargs: Any
    ) -> tuple[Any, ...] | BaseModelOutputWithPooling:
        """Runs the tower.

        Args:
            pixel_values: `[N, C, height, width]`, each image in the upper left corner of its own.
            image_sizes: What each image fills of that; all of it when None.
            **kwargs: `output_hidden_states`, `output_attentions` (with eager attention), `return_dict`, and what the
                layers take.

        Returns:
            `last_hidden_state` `[1, P, H]`, images in the order given, patches of an image row by row; and
            `hidden_states`, `attentions` where asked for.

        Raises:
            ValueError: When an image has no whole patch, or is larger than `pixel_values`.
        """
        sizes = [tuple(pixel_values.shape[2:])] * len(pixel_values) if image_sizes is None else size_pairs(image_sizes)
        if self.config._attn_implementation != PACKED_ATTENTION:
            stock: tuple[Any, ...] | BaseModelOutputWithPooling = super().forward(
                pixel_values, image_sizes=sizes, **kwargs
            )
            return stock
        grids = self._grids(pixel_values, sizes)
        per_image: tuple[Any, ...] | BaseModelOutputWithPooling = self._forward_per_image(pixel_values, grids, **kwargs)
        return per_image

    @merge_with_config_defaults
    @capture_outputs
    def _forward_per_image(
        self, pixel_values: torch.Tensor, grids: list[tuple[int, int]], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The tower on N images of `grids` patches down and across, as packed tokens."""
        patch_embeds = self.ln_pre(self._embed_patches(pixel_values, grids))[None]
        positions = _grid_positions(grids).to(patch_embeds.device, non_blocking=True)
        lengths = tuple(height * width for height, width in grids)
        output: BaseModelOutputWithPooling = self.transformer(
            patch_embeds,
            attention_mask=None,
            position_embeddings=self.patch_positional_embedding(patch_embeds, positions),
            packed_lengths=lengths,
            packed_offsets=packed_offsets(lengths).to(patch_embeds.device, non_blocking=True),
            **kwargs,
        )
        return output

    def _grids(self, pixel_values: torch.Tensor, sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        """Patches down and across of each image; raises ValueError as `forward` says."""
        patch: Any = self.patch_size
        height, width = pixel_values.shape[2:]
        if len(sizes) != len(pixel_values):
            raise ValueError(f"image_sizes: one for each of {len(pixel_values)} images, got {len(sizes)}")
        for index, size in enumerate(sizes):
            if min(size) < patch or size[0] > height or size[1] > width:
                raise ValueError(
                    f"image_sizes[{index}]: must be from {patch} x {patch} (one patch) to {height} x {width} "
                    f"(pixel_values), got {size[0]} x {size[1]}"
                )
        return [(size[0] // patch, size[1] // patch) for size in sizes]

    def _embed_patches(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """Patches `[P, H]`: those of a convolution whose stride is its kernel's size, as one matrix product."""
        size, weight = self.patch_size, self.patch_conv.weight
        pixels = pixel_values.to(weight.dtype)
        pieces = []
        for start, count, (height, width) in _runs(grids):
            run = pixels[start : start + count, :, : height * size, : width * size]
            run = run.unflatten(2, (height, size)).unflatten(4, (width, size))
            pieces.append(run.permute(0, 2, 4, 1, 3, 5).reshape(count * height * width, -1))
        return F.linear(torch.cat(pieces), weight.flatten(1))


class PerImageMistral3Model(Mistral3Model):
    """`Mistral3Model`, text and vision without a head, around the per-image tower."""

    def __init__(self, config: Mistral3Config) -> None:
        """Builds the model with random weights.

        Args:
            config: Of the whole model.
        """
        super().__init__(config)
        if isinstance(self.vision_tower, PixtralVisionModel):
            self.vision_tower = PerImagePixtralModel.adopt(self.vision_tower)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: ImageSizes,
        vision_feature_layer: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """States of the vision tower, and from them what takes the place of image tokens among the text's embeddings.

        As transformers' own, but right for a single image of a single token, and the tower keeps the states of all
        layers only where another than the last is asked for.

        Args:
            pixel_values: `[N, C, height, width]`.
            image_sizes: What each image fills of that.
            vision_feature_layer: Layer whose states are projected; the config's when None. transformers also takes
                several, but its projector has no weights for them.
            **kwargs: Handed to the tower.

        Returns:
            The tower's output, with `pooler_output`: N tensors `[image tokens, hidden size of the text]`.
        """
        layer: Any = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        sizes = size_pairs(image_sizes)
        if layer != -1:
            kwargs["output_hidden_states"] = True
        output: Any = self.vision_tower(pixel_values, image_sizes=sizes, return_dict=True, **kwargs)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        pixels = self.vision_tower.patch_size * self.config.spatial_merge_size
        tokens = [(height // pixels) * (width // pixels) for height, width in sizes]
        output.pooler_output = self.multi_modal_projector(states[0], sizes).split(tokens)
        features: BaseModelOutputWithPooling = output
        return features


def size_pairs(image_sizes: ImageSizes) -> list[tuple[int, int]]:
    """Heights and widths as Python integers, read from a device in one go."""
    rows = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
    return [(int(height), int(width)) for height, width in rows]


def _runs(grids: Sequence[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """First index, count and grid of every run of neighbouring equal grids."""
    runs: list[tuple[int, int, tuple[int, int]]] = []
    for index, grid in enumerate(grids):
        if runs and runs[-1][2] == grid:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, grid)
        else:
            runs.append((index, 1, grid))
    return runs


def _grid_positions(grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`[P, 2]` row and column of every patch in its image."""
    made = {grid: torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) for grid in set(grids)}
    return torch.cat([made[grid] for grid in grids])

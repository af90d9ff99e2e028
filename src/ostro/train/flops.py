"""Floating-point operations of a vision-language training step, and what the device could do: model FLOPs utilisation.

Only products of the model are counted (two operations per multiply-add), not what is computed again by activation
checkpointing. The idea: a linear layer costs 2 x weights x tokens forward; backward costs the same once for the
gradient of its input, where something in front of it trains, and once for its weights, where they train.

Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B, for utilisation.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import torch
from transformers import Mistral3Config

from ostro.data.conversation_collate import ConversationBatch
from ostro.train.options import Part

# Dense bfloat16 operations per second from the makers' data sheets, by what a device's name contains.
_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
_PROBE_SIZE = 2048


def step_flops(config: Mistral3Config, batch: ConversationBatch, trained: Collection[Part]) -> float:
    """Operations of forward and backward over one packed batch.

    Args:
        config: Of the model.
        batch: The samples; attention is counted within each sample (half of it, as it is causal) and each image.
        trained: Parts that receive gradients.

    Returns:
        Operations; the head is counted for the supervised tokens alone, as the fused loss computes it.
    """
    text: Any = config.text_config  # transformers annotates sub-configs as dict or None too
    vision: Any = config.vision_config
    attention_width = text.num_attention_heads * text.head_dim
    per_layer = text.hidden_size * (2 * attention_width + 2 * text.num_key_value_heads * text.head_dim)
    per_layer += 3 * text.hidden_size * text.intermediate_size
    squares = sum(length**2 for length in batch.lengths)
    before_text = bool({"vision", "projector", "embeddings"} & set(trained))
    passes = _passes(before_text, "language_model" in trained)
    text_flops = 2.0 * text.num_hidden_layers * per_layer * sum(batch.lengths) * passes
    text_flops += 2.0 * text.num_hidden_layers * attention_width * squares * (3 if passes > 1 else 1)
    head_passes = _passes(before_text or "language_model" in trained, bool({"head", "embeddings"} & set(trained)))
    head_flops = 2.0 * text.hidden_size * text.vocab_size * batch.num_supervised * head_passes
    if batch.image_sizes is None:
        return float(text_flops + head_flops)
    patches = (batch.image_sizes // vision.patch_size).prod(dim=-1).double()
    width, num_patches = vision.hidden_size, float(patches.sum())
    per_patch = vision.num_hidden_layers * width * (4 * width + 3 * vision.intermediate_size)
    vision_flops = 2.0 * per_patch * num_patches
    vision_flops += 4.0 * vision.num_hidden_layers * width * float(patches.square().sum())
    vision_flops *= _passes(False, "vision" in trained)
    # pixels need no gradient
    vision_flops += 2.0 * vision.num_channels * vision.patch_size**2 * width * num_patches * (1 + ("vision" in trained))
    merged = config.spatial_merge_size**2
    per_token = merged * width**2 + width * text.hidden_size + text.hidden_size**2
    projector_flops = 2.0 * per_token * num_patches / merged * _passes("vision" in trained, "projector" in trained)
    return float(text_flops + head_flops + vision_flops + projector_flops)


def _passes(input_trains: bool, weights_train: bool) -> int:
    """Products of a linear layer's size: forward, gradient of the input, gradient of the weights.

    Where the weights of a part train, so does the norm before each of its layers, which needs the input's gradient.
    """
    return 1 + (input_trains or weights_train) + weights_train


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that the device reaches at best.

    Args:
        device: CUDA devices that are known take the maker's figure for bfloat16; any other is measured by a square
            matrix product on the threads torch has, which takes a fraction of a second.
        dtype: Of the products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS.items():
            if part in name:
                return peak
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        # one element on the host waits for the whole product on any device
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2.0 * _PROBE_SIZE**3 / min(times)

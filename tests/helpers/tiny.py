"""Tiny real models for tests: every mechanism of the family (grouped heads, yarn, Llama-4 query scale) at a size that
runs in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Ministral3Config, Mistral3Config


def text_config(**overrides: Any) -> Ministral3Config:
    """A 2-layer Ministral-3 text config: hidden 32, 4 heads over 2 key-value heads, yarn rope with a small original
    length."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }
    return Ministral3Config(**{**settings, **overrides})


def vlm_config(*, tie_word_embeddings: bool = True, **text_overrides: Any) -> Mistral3Config:
    """A Mistral-3 vision-language config around `text_config` with a 2-layer Pixtral tower."""
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 112,
    }
    return Mistral3Config(
        text_config=text_config(**text_overrides).to_dict(),
        vision_config=vision,
        tie_word_embeddings=tie_word_embeddings,
    )


def token_ids(lengths: list[int], *, vocab_size: int = 96, seed: int = 0) -> list[list[int]]:
    """Random token ids (never a special one) of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(14, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def padded(ids: list[list[int]], *, side: str = "right", pad: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both `[B, S]`, padded on the given side."""
    width = max(map(len, ids))
    input_ids = torch.full((len(ids), width), pad)
    mask = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, text in enumerate(ids):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        input_ids[row, where] = torch.tensor(text)
        mask[row, where] = 1
    return input_ids, mask

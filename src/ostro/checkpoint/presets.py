"""Sizes of random Mistral-3 models, and their `config.json`: what `ostro init` offers.

It knows no tensors and imports no torch, so that a command line can list the names; the weights are made in `create`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SIZES: Mapping[str, Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        # 2.9 M parameters at a vocabulary of 8192: trains in minutes on a CPU
        "tiny": {
            "text": {
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 32,
            },
            "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        # 3.0 M parameters at a vocabulary of 4096, a sixth of them vision: the vision demo
        "scenes": {
            "text": {
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 32,
                # layers this narrow hardly pass a signal on at the 0.02 of the releases
                "initializer_range": 0.05,
            },
            "vision": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
        },
        # 20 M parameters at a vocabulary of 8192
        "small": {
            "text": {
                "hidden_size": 512,
                "intermediate_size": 1536,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 64,
            },
            "vision": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
        },
        # the shape of Ministral-3-3B-2512, which has a vocabulary of 131072
        "3b": {
            "text": {
                "hidden_size": 3072,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
            "vision": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
        },
    }
)
"""Shapes of the text and the vision tower by preset."""

LAYOUT_NAMES = ("nested", "identity", "text-only")
"""Layouts a folder can be made in."""

PRECISIONS = ("fp8", "bf16")
"""Stored precisions of the text layers."""

# The values of Ministral-3-*-2512, whatever the size.
_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "pad_token_id": 11,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "use_cache": True,
}
_VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "image_size": 1540,
    "initializer_range": 0.02,
    "model_type": "pixtral",
    "num_channels": 3,
    "patch_size": 14,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
_OUTER = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
}


def model_config(size: str, *, vocab_size: int, tie_word_embeddings: bool) -> dict[str, Any]:
    """`config.json` of a vision-language model, without `quantization_config`.

    Args:
        size: A key of `SIZES`.
        vocab_size: Rows of the embedding.
        tie_word_embeddings: Whether the head is the embedding.

    Returns:
        Plain data; `text_config` alone is that of the text model.
    """
    shapes = SIZES[size]
    text = {**_TEXT, **shapes["text"], "tie_word_embeddings": tie_word_embeddings, "vocab_size": vocab_size}
    config = {
        **_OUTER,
        "text_config": text,
        "tie_word_embeddings": tie_word_embeddings,
        "vision_config": {**_VISION, **shapes["vision"]},
    }
    # deep: transformers writes to the rope_parameters of a configuration it is given
    return copy.deepcopy(config)

"""`quantization_config` of an FP8 folder, as the releases write it; it imports no torch."""

from __future__ import annotations

from typing import Any, Literal

NOT_CONVERTED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
"""Modules that stay in bfloat16, in the names of transformers."""


def quantization_config(activation_scheme: Literal["static", "dynamic"]) -> dict[str, Any]:
    """What `config.json` says of FP8 weights with one scale each.

    Args:
        activation_scheme: `static` where the files hold activation scales, else `dynamic`.
    """
    return {
        "activation_scheme": activation_scheme,
        "dequantize": False,
        "modules_to_not_convert": list(NOT_CONVERTED),
        "quant_method": "fp8",
        "weight_block_size": None,
    }

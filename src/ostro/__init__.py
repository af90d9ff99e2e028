"""Ostro adapts Mistral-3 models: bidirectional search embedders and fine-tuning from FP8 weights.

The public names are loaded on first use, so that `import ostro` and the command line stay quick and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ostro.errors import CheckpointError, DataError, LayoutError, OstroError, RecipeError

if TYPE_CHECKING:
    from ostro.checkpoint.auto import AutoModelForImageTextToText
    from ostro.inference.chat import Chat
    from ostro.inference.encoder import Encoder
    from ostro.models.backbone import build_encoder_backbone
    from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
    from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
    from ostro.models.registry import ModelRegistry

__version__ = "0.1.0"

__all__ = [
    "AutoModelForImageTextToText",
    "Chat",
    "CheckpointError",
    "DataError",
    "Encoder",
    "LayoutError",
    "Ministral3BidirectionalConfig",
    "Ministral3BidirectionalModel",
    "Mistral3FP8VLMForConditionalGeneration",
    "ModelRegistry",
    "OstroError",
    "RecipeError",
    "__version__",
    "build_encoder_backbone",
]

_HOMES = {
    "AutoModelForImageTextToText": "ostro.checkpoint.auto",
    "Chat": "ostro.inference.chat",
    "Encoder": "ostro.inference.encoder",
    "Ministral3BidirectionalConfig": "ostro.models.ministral_bidirectional",
    "Ministral3BidirectionalModel": "ostro.models.ministral_bidirectional",
    "Mistral3FP8VLMForConditionalGeneration": "ostro.models.mistral3_vlm",
    "ModelRegistry": "ostro.models.registry",
    "build_encoder_backbone": "ostro.models.backbone",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ostro' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

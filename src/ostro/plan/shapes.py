"""The model that one rank trains, without storage: what a split leaves of every weight.

Bytes are left to `memory`. The idea: the real classes are built on the meta device; then linears that tensor-parallel
ranks share are replaced by their share. Its weights can be counted, and its layers run, as any model's.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import Ministral3Config, Mistral3Config, PreTrainedConfig, PreTrainedModel
from transformers.models.pixtral.modeling_pixtral import PixtralAttention

from ostro.models.backbone import MODEL_CLASSES
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.parallel.plans import VISION_LANGUAGE, VISION_SIDE, Plan
from ostro.train.options import Part
from ostro.train.parts import part_of

DeviceKind = Literal["cuda", "cpu"]
"""Devices whose attention kernels are known."""

_SHARED_DIMS = {"outputs": 0, "vocabulary": 0, "head": 0, "inputs": 1}
"""Dim of a weight that tensor-parallel ranks share, by the role of its module."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained, as far as it decides about memory.

    Attributes:
        config: Of the vision-language model, or of the text tower where an embedder is trained.
        dtype: Of weights and activations in forward and backward.
        frozen: Parts that keep their weights.
        recompute: Whether activations are checkpointed.
        num_tokens: Tokens of a micro-batch.
        image_share: Of those, the share that are image tokens, 0 to 1.
        device: Whose kernels run.
        num_texts: Queries and documents of a contrastive batch over all ranks; none for a vision-language model.
        tp_vision: Whether tensor-parallel ranks split the vision side, too.
        shard_frozen: Whether FSDP splits frozen weights, too.
        schedule: Of a pipeline.
        stages_per_rank: Of a pipeline.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    frozen: frozenset[Part]
    recompute: bool
    num_tokens: int
    image_share: float
    device: DeviceKind
    num_texts: tuple[int, int] = (0, 0)
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    tp_vision: bool = False
    shard_frozen: bool = True

    @property
    def plan(self) -> Plan:
        """How tensor-parallel ranks split the layers."""
        return {**VISION_LANGUAGE, **VISION_SIDE} if self.tp_vision else VISION_LANGUAGE

    @property
    def is_embedder(self) -> bool:
        """Whether a text tower is trained as an embedder."""
        return not isinstance(self.config, Mistral3Config)

    @property
    def text_config(self) -> Ministral3Config:
        """Of the text layers."""
        text: Any = self.config if self.is_embedder else vars(self.config)["text_config"]
        return text  # type: ignore[no-any-return]

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one weight."""
        return not self.is_embedder and bool(vars(self.config)["tie_word_embeddings"])

    @property
    def num_patches(self) -> int:
        """Patches of the images of a micro-batch."""
        if self.is_embedder:
            return 0
        return int(self.num_tokens * self.image_share) * int(vars(self.config)["spatial_merge_size"]) ** 2


def build(settings: Settings, *, tp: int = 1, num_layers: int | None = None) -> PreTrainedModel:
    """The model on the meta device, frozen where it is, with this rank's share of every split linear.

    Args:
        settings: Of the run.
        tp: Ranks that split a layer; it divides the heads, key-value heads, intermediate size and vocabulary.
        num_layers: Layers of each tower in place of the config's.
    """
    config: Any = copy.deepcopy(settings.config)
    if num_layers is not None:
        for tower in (config,) if settings.is_embedder else (config.text_config, config.vision_config):
            tower.num_hidden_layers = num_layers
    with torch.device("meta"):
        if settings.is_embedder:
            model_class = MODEL_CLASSES["embedding"][config.model_type]
            dropped = {"model_type", "architectures", "auto_map", "quantization_config", "dtype"}
            fields = {key: value for key, value in config.to_dict().items() if key not in dropped}
            bidirectional: Any = model_class.config_class
            config = bidirectional(**{**fields, "is_causal": False, "use_cache": False})
            model: PreTrainedModel = model_class._from_config(config, dtype=settings.dtype)
        else:
            model = Mistral3FP8VLMForConditionalGeneration._from_config(config, dtype=settings.dtype)
        for name, module in model.named_modules():
            for key, weight in module.named_parameters(recurse=False):
                if (dim := split_dim(settings, full_name(settings, f"{name}.{key}"), tp)) is not None:
                    shape = list(weight.shape)
                    shape[dim] //= tp
                    setattr(module, key, torch.nn.Parameter(weight.new_empty(shape)))
            if settings.tp_vision and isinstance(module, PixtralAttention):
                module.num_heads //= tp
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(full_name(settings, name)) not in settings.frozen)
    model.train()
    return model


def full_name(settings: Settings, name: str) -> str:
    """The name that a weight of either kind of model has in the vision-language model."""
    return f"model.language_model.{name}" if settings.is_embedder else name


def split_dim(settings: Settings, name: str, tp: int) -> int | None:
    """The dim of a weight that `tp` ranks share; None where each holds all of it.

    Args:
        settings: Of the run.
        name: In the vision-language model.
        tp: Ranks that split a layer.
    """
    if tp > 1:
        for pattern, role in settings.plan.items():
            if role in _SHARED_DIMS and re.fullmatch(rf"(?:{pattern})\.weight", name):
                return _SHARED_DIMS[role]
    return None


@dataclass(frozen=True)
class Counts:
    """Weights of a model or of a part of it.

    Attributes:
        all: How many.
        trained: How many of them are trained.
        largest: Entries of the largest trained weight.
    """

    all: int = 0
    trained: int = 0
    largest: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.all + other.all, self.trained + other.trained, max(self.largest, other.largest))

    def sharded(self, settings: Settings) -> int:
        """How many FSDP splits."""
        return self.all if settings.shard_frozen else self.trained

    def times(self, number: int) -> Counts:
        """Those of so many equal ones."""
        return Counts(self.all * number, self.trained * number, self.largest)

    def shared(self, number: int) -> Counts:
        """Those of each of so many equal ones."""
        return Counts(self.all // number, self.trained // number, self.largest)

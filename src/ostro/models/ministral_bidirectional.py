"""The Ministral-3 text tower with bidirectional attention, as embeddings need it: every token sees every other token.

Pooling and normalisation are left to `pooling` and `embedder`, loading from other checkpoints to `backbone`. The idea:
the layers are transformers' own; only the mask and the position ids differ from `Ministral3Model`.

* The mask is built here, and the attention layers are told `is_causal=False`: with either alone, some attention
  functions stay causal.
* Position ids count tokens, not padding. The rotary part is relative and would not notice, but the Llama-4 query scale
  `1 + beta log(1 + floor(position / original_max_position_embeddings))` is absolute: padding on the left would change
  long texts.

Importing this module registers the model with transformers' Auto classes.

Shapes: B texts, S tokens of this call, P tokens already in the cache, H hidden size.
"""

# no `from __future__ import annotations`: the config's fields are checked against their types, which would be strings
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, Ministral3Config, Ministral3Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

logger = logging.get_logger(__name__)

_NEVER_CAUSAL = "is_causal: must be False, got True; use Ministral3Config and Ministral3Model for causal attention"


@strict
class Ministral3BidirectionalConfig(Ministral3Config):
    """Configuration for Ministral3BidirectionalModel with pooling and temperature settings.

    Attributes:
        pooling: How token states become one vector; one of `ostro.models.pooling.POOL_TYPES`.
        temperature: Divides the similarities in the contrastive loss, > 0.
        is_causal: Always False.
        use_cache: Whether `forward` returns a cache when the call does not say; an embedder has no use for one.
    """

    model_type = "ministral3_bidirec"

    pooling: str = "avg"
    temperature: float | int = 1.0
    is_causal: bool = False
    use_cache: bool = False

    def validate_embedding_settings(self) -> None:
        """Checks what the types of the fields cannot say; called when the config is made and when it is saved.

        Raises:
            ValueError: When `is_causal` is True or `temperature` is not positive.
        """
        if self.is_causal:
            raise ValueError(_NEVER_CAUSAL)
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be > 0, got {self.temperature}")


class Ministral3BidirectionalModel(Ministral3Model):
    """Ministral3Model modified to use bidirectional (non-causal) attention.

    Text-only checkpoints load with `from_pretrained`. A Mistral-3 vision-language checkpoint needs its language tower
    taken out: `ostro.models.backbone.build_encoder_backbone(..., extract_submodel="language_model")`.
    """

    config_class = Ministral3BidirectionalConfig
    config: Ministral3BidirectionalConfig

    def __init__(self, config: Ministral3BidirectionalConfig) -> None:
        """Builds the tower with random weights.

        Args:
            config: The configuration.

        Raises:
            ValueError: When the configuration asks for causal attention.
        """
        super().__init__(config)
        if self.config.to_dict().get("is_causal"):
            raise ValueError(_NEVER_CAUSAL)
        self.config.is_causal = False
        layers: Any = self.layers
        for layer in layers:
            layer.self_attn.is_causal = False

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache_position: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Forward pass with bidirectional attention.

        Identical to Ministral3Model.forward() except that the causal mask is replaced with a bidirectional mask, and
        that default position ids do not count padding.

        Args:
            input_ids: Token ids `[B, S]`; either these or `inputs_embeds`.
            attention_mask: `[B, P + S]`, 1 for tokens and 0 for padding on either side; or a finished
                `[B, 1, S, P + S]` mask, used as it is.
            position_ids: `[B, S]`; counted from a 2-D `attention_mask` when None, else from `cache_position`.
            past_key_values: Keys and values of earlier calls. The tokens of this call see them and each other; what
                earlier calls returned does not change, so a text given in pieces is not the text given at once.
            inputs_embeds: `[B, S, H]` in place of `input_ids`.
            use_cache: Whether to return `past_key_values`; the config's `use_cache` when None.
            cache_position: Indices `[S]` of this call's tokens among all P + S; following the cache when None.
            **kwargs: `output_hidden_states`, `output_attentions` (with eager attention), and what the attention
                function takes, which every layer hands on. With `packed_lengths` no mask is made: that attention
                function keeps texts apart itself.

        Returns:
            `last_hidden_state` `[B, S, H]`, and `past_key_values`, `hidden_states`, `attentions` where asked for.

        Raises:
            ValueError: When not exactly one of `input_ids` and `inputs_embeds` is given, or the call or the config asks
                for causal attention.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if kwargs.get("is_causal"):
            raise ValueError(_NEVER_CAUSAL)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            # without the config, all keys are kept: the symmetric window reaches one further back than a sliding cache
            past_key_values = DynamicCache()
        positions: torch.Tensor | None = position_ids
        if positions is None:
            positions = _position_ids(hidden_states, attention_mask, past_key_values, cache_position)
        mask = None
        if "packed_lengths" not in kwargs:
            windowed = self.config.sliding_window is not None
            make_mask = create_bidirectional_sliding_window_mask if windowed else create_bidirectional_mask
            mask = make_mask(self.config, hidden_states, attention_mask, past_key_values=past_key_values)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions)
        # a slice, as in transformers: that of a pipeline stage has its layers alone
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


def _position_ids(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    cache_position: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, S]` or `[1, S]` positions: how many real tokens come before, or the index where no 2-D mask is given."""
    if cache_position is None:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        cache_position = torch.arange(hidden_states.shape[1], device=hidden_states.device) + start
    if attention_mask is None or attention_mask.ndim != 2:
        return cache_position[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).to(hidden_states.device)[:, cache_position]


def _register_with_hf_auto_classes() -> None:
    """Register bidirectional Ministral3 with HuggingFace Auto classes.

    Needed so `AutoModel.from_config(Ministral3BidirectionalConfig)` and checkpoint reload paths that use Auto
    resolution work consistently. Calling it again changes nothing.
    """
    AutoConfig.register(Ministral3BidirectionalConfig.model_type, Ministral3BidirectionalConfig, exist_ok=True)
    AutoModel.register(Ministral3BidirectionalConfig, Ministral3BidirectionalModel, exist_ok=True)
    logger.debug("registered %s with transformers' Auto classes", Ministral3BidirectionalConfig.model_type)


ModelClass = [Ministral3BidirectionalModel]

__all__ = ["Ministral3BidirectionalModel", "Ministral3BidirectionalConfig", "ModelClass"]  # noqa: RUF022

_register_with_hf_auto_classes()

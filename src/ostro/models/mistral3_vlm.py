"""The Mistral-3 vision-language model as Ostro trains it: built from an FP8 folder's config, holding bfloat16 weights.

Reading files is left to `ostro.checkpoint`, the vision tower to `vision`. The idea: the architecture is transformers'
own `Mistral3ForConditionalGeneration`, by the same module names; what differs is around it.

* FP8 linears are not put in. The config that the model keeps has no `quantization_config`, since its weights are what
  the FP8 values stand for; `state_dict_adapter` knows how the files store them, for a loader that streams.
* Rotary frequencies are in no file. A model built on the meta device gets them from a hook at the first forward, if the
  loader has not made them before.
* `forward` can hand out the final hidden states with only a few positions' logits, for a loss that never makes all
  logits at once.
* Several samples can share a row without padding, causal and apart: see `ostro.models.packed`.

Shapes: B rows, S tokens of a row, T tokens of packed samples (B is 1, S is T), N images, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.mistral3.modeling_mistral3 import Mistral3CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ostro.models.fp8_adapter import Mistral3FP8StateDictAdapter
from ostro.models.packed import PACKED_ATTENTION, PACKED_MASK, packed_positions
from ostro.models.rope import is_rotary, rebuild_rotary
from ostro.models.vision import PerImageMistral3Model

logger = logging.getLogger(__name__)

_STOCK_ARCHITECTURE = Mistral3ForConditionalGeneration.__name__
# transformers renames the keys of nested folders for its own classes only
_NESTED_KEYS = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}


class Mistral3FP8VLMForConditionalGeneration(Mistral3ForConditionalGeneration):
    """Full-VLM (vision + text) FP8 loader for Mistral3ForConditionalGeneration.

    For FP8-native folders use `ostro.AutoModelForImageTextToText.from_pretrained`, which streams the weights in.
    `from_pretrained` here is transformers' own, for bfloat16 folders. Of an FP8 folder it makes plain linears on the
    CPU; on a GPU transformers puts its FP8 linears in, unless it is given
    `quantization_config=FineGrainedFP8Config(dequantize=True)`.

    Attributes:
        state_dict_adapter: Between this model's weights and those of an FP8 folder.
    """

    def __init__(self, config: Mistral3Config) -> None:
        """Builds the model with random weights, in plain linears.

        Args:
            config: FP8-native or not. The model keeps a copy of it without `quantization_config`; the object given is
                left as it was.
        """
        source = copy.deepcopy(config)
        config = copy.deepcopy(config)
        vars(config).pop("quantization_config", None)
        # the stock constructor, but for the class of the inner model
        super(Mistral3ForConditionalGeneration, self).__init__(config)
        self.model = PerImageMistral3Model(config)
        text: Any = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        self.state_dict_adapter = Mistral3FP8StateDictAdapter.for_vlm_full(source)
        for module in self.modules():
            if is_rotary(module):
                module.register_forward_pre_hook(_rotary_reinit_self_hook, with_kwargs=True)

    @classmethod
    def supports_config(cls, config: PreTrainedConfig) -> bool:
        """Claim FP8-native Mistral3 VLM configs.

        Matches `Mistral3Config` (outer VLM) with a ministral3 text backbone and
        `quantization_config.quant_method == 'fp8'`.

        Args:
            config: Any configuration; its `quantization_config` may be a dict or an object.
        """
        if not isinstance(config, Mistral3Config):
            return False
        text: Any = config.text_config
        if text.model_type != Ministral3Config.model_type:
            return False
        quantization = vars(config).get("quantization_config") or {}
        settings = quantization if isinstance(quantization, Mapping) else vars(quantization)
        return bool(settings.get("quant_method") == "fp8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, for folders in the nested and the identity layout.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        kwargs.setdefault("key_mapping", _NESTED_KEYS)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, in the identity layout, for transformers' own class.

        Weights are written as the model holds them: transformers would otherwise quantise the linears of what it read
        from an FP8 folder once more, without saying so in `config.json`.

        Args:
            save_directory: Folder to write.
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [_STOCK_ARCHITECTURE]
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Mistral3CausalLMOutputWithPast:
        """Forward pass with memory-efficient fused cross-entropy (cut-CE) support.

        Args:
            input_ids: Token ids `[B, S]`; either these or `inputs_embeds`.
            pixel_values: Images `[N, 3, height, width]`, in the order of their tokens in `input_ids`.
            attention_mask: `[B, P + S]`, 1 for tokens and 0 for padding, P tokens being in the cache.
            position_ids: `[B, S]`.
            past_key_values: Keys and values of earlier calls.
            inputs_embeds: `[B, S, H]` in place of `input_ids`.
            labels: `[B, S]` token ids, -100 where nothing is learnt; position i is predicted from those before it.
            use_cache: Whether to return `past_key_values`; the config's when None.
            logits_to_keep: Logits are computed for that many last positions, 0 for all; or for the positions in a 1-D
                tensor of indices.
            image_sizes: Height and width `[N, 2]` of each image within `pixel_values`.
            output_hidden_states: Whether to surface the final hidden states; the text sub-config's when None.
            **kwargs: `output_attentions` (with eager attention), `return_dict`, `num_items_in_batch`, and what layers
                and attention functions take. With `packed_lengths` and `packed_offsets` the row holds several samples,
                each attending to itself; `attention_mask` and `position_ids` then need not be given.

        Returns:
            `logits` `[B, kept, V]`; `loss` where there are labels; `hidden_states`: not the tuple of all layers, but
            the one tensor `[B, S, H]` that `lm_head` takes, of all positions; `past_key_values`, `attentions`,
            `image_hidden_states` `[image tokens, H]` where there are any.

        Raises:
            ValueError: When labels are given with only some positions' logits, since their loss is not that of the
                labels; or a packed call meets another attention function than the packed one.
        """
        kept = _kept_positions(logits_to_keep)
        if labels is not None and kept != slice(0, None):
            raise ValueError(
                f"logits_to_keep: must be 0 where labels are given, got {logits_to_keep}; take the loss from "
                "hidden_states, or all logits"
            )
        inner: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        if "packed_lengths" in kwargs:
            inner = self._packed_inputs(inner, kwargs["packed_lengths"])
        text: Any = self.config.text_config
        if output_hidden_states is None:
            output_hidden_states = text.output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            # the inner model would keep every layer's states
            output_hidden_states=False,
            return_dict=True,
            **inner,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            if "packed_offsets" in kwargs:
                # a sample's first token follows nothing; unpacked, the shift drops its label
                labels = labels.index_fill(-1, kwargs["packed_offsets"][:-1].long(), -100)  # type: ignore[assignment]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        return Mistral3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _packed_inputs(self, inputs: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
        """Mask, positions and use of the cache for packed samples, where the caller leaves them out."""
        attention = self.model.language_model.config._attn_implementation
        if attention != PACKED_ATTENTION:
            raise ValueError(
                f"packed_lengths: attention function must be {PACKED_ATTENTION!r}, got {attention!r}; call "
                "use_packed_attention(model) first"
            )
        positions = packed_positions(lengths)[None].to(self.device) if inputs["position_ids"] is None else None
        defaults = {"attention_mask": PACKED_MASK, "position_ids": positions, "use_cache": False}
        return {name: defaults[name] if value is None else value for name, value in inputs.items()}


def _kept_positions(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Index of the positions whose logits are computed."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None)
    if logits_to_keep.ndim != 1:
        raise ValueError(f"logits_to_keep: must be an integer or a 1-D tensor, got shape {tuple(logits_to_keep.shape)}")
    return logits_to_keep


def _rotary_reinit_self_hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One-shot forward pre-hook that recomputes *this rotary module's* own frequencies on first call.

    Attached per rotary, so that it also fires where the outer model's `forward` is never called, as under pipeline
    parallelism. Other hooks of the module stay.
    """
    if module.get_buffer("inv_freq").is_meta:
        return  # nothing to fill yet; the first call with storage will
    rebuild_rotary(module)
    logger.debug("%s: frequencies made at the first call", type(module).__name__)
    for hook_id, hook in list(module._forward_pre_hooks.items()):
        if hook is _rotary_reinit_self_hook:
            del module._forward_pre_hooks[hook_id]
            module._forward_pre_hooks_with_kwargs.pop(hook_id, None)


ModelClass = Mistral3FP8VLMForConditionalGeneration

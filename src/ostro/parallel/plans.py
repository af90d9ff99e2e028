"""How the layers of a model are split over the ranks of `tp`: a role for each module, by its name in the model.

Carrying a plan out is left to `apply`. The idea of a split layer: of two products in a row, the first keeps some rows
of its weight on each rank and so makes some of the channels (whole attention heads), the second keeps the columns that
read those channels and makes a part of every output; one sum over the ranks after each pair is all that is sent.

The text tower is split. The vision tower and the projector stay whole on every rank unless that is asked for: they are
0.4 to 2.7 billion parameters beside 3 to 128 and often frozen, and splitting them sends two sums of all patches per
layer.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Role = Literal["input", "hidden_states", "heads", "outputs", "inputs", "vocabulary", "head"]
"""What a module does in a split layer.

* `input`, `hidden_states`: its argument, the first or of that name, is read by several modules that are split by
  `outputs`, so that the gradient of the argument is summed over the ranks once for all of them;
* `heads`: as `hidden_states`, of an attention that has its number of heads written down;
* `outputs`: a linear layer that makes some of its outputs on each rank: rows of the weight;
* `inputs`: a linear layer that reads some of its inputs on each rank: columns of the weight;
* `vocabulary`: an embedding of which each rank holds some rows;
* `head`: a linear layer of which each rank holds some rows, and whose output is whole on every rank.
"""

Plan = Mapping[str, Role]
"""Role by pattern; a pattern is a regular expression for the whole name of a module."""

TEXT_TOWER: Plan = {
    r"embed_tokens": "vocabulary",
    r"layers\.\d+\.self_attn": "hidden_states",
    r"layers\.\d+\.self_attn\.[qkv]_proj": "outputs",
    r"layers\.\d+\.self_attn\.o_proj": "inputs",
    r"layers\.\d+\.mlp": "input",
    r"layers\.\d+\.mlp\.(gate|up)_proj": "outputs",
    r"layers\.\d+\.mlp\.down_proj": "inputs",
}
"""Of `Ministral3Model` and the towers made from it."""

VISION_LANGUAGE: Plan = {rf"model\.language_model\.{name}": role for name, role in TEXT_TOWER.items()} | {
    r"lm_head": "head"
}
"""Of `Mistral3ForConditionalGeneration`."""

_VISION_LAYER = r"model\.vision_tower\.transformer\.layers\.\d+"
VISION_SIDE: Plan = {
    rf"{_VISION_LAYER}\.attention": "heads",
    rf"{_VISION_LAYER}\.attention\.[qkv]_proj": "outputs",
    rf"{_VISION_LAYER}\.attention\.o_proj": "inputs",
    rf"{_VISION_LAYER}\.feed_forward": "input",
    rf"{_VISION_LAYER}\.feed_forward\.(gate|up)_proj": "outputs",
    rf"{_VISION_LAYER}\.feed_forward\.down_proj": "inputs",
    r"model\.multi_modal_projector\.linear_1": "outputs",
    r"model\.multi_modal_projector\.linear_2": "inputs",
}
"""Of its vision tower and projector, for `parallel.tp_vision`. Patch embedding, norms and patch merger stay whole."""

TOKENWISE = (
    *("input_layernorm", "post_attention_layernorm", "mlp"),
    *("attention_norm", "ffn_norm", "feed_forward"),
)
"""Parts of a text and of a vision layer that act on one token at a time, by their name in the layer."""

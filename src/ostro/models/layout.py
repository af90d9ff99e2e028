"""How the tensors of a weights folder are named: the layouts as tables, and `recognise(keys)` that tells which it is.

Reading the tensors is left to others. The idea: a layout is a property of the files, not of the model, so it is found
from the keys alone: it is the one layout whose rows cover every key. Each row pairs a stored pattern with a runtime
one, and runtime names are the same for all layouts (those of `Mistral3ForConditionalGeneration`), so a key goes from
any layout to any other through them:

    runtime = NESTED.to_runtime("language_model.model.layers.0.mlp.up_proj.weight")
    assert BARE.to_stored(runtime) == "layers.0.mlp.up_proj.weight"
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ostro.errors import LayoutError, shorten


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a Mistral-3 model.

    Attributes:
        name: As users and messages call it.
        rows: Stored and runtime pattern of each part; `*` stands for the same non-empty text in both, `#` for the same
            number.
        skipped: Stored patterns of tensors that are no part of the model.
        interleaved: Runtime patterns of the weights whose output rows are stored in another order: within each head,
            the two halves that rotate against each other take turns. Runtime row `j * head_dim / 2 + i` of a head is
            stored row `2 * i + j`.
    """

    name: str
    rows: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...] = ()
    interleaved: tuple[str, ...] = ()

    def to_runtime(self, key: str) -> str:
        """The runtime name of a stored key.

        Args:
            key: As in the files.

        Raises:
            LayoutError: When the layout has no such key.
        """
        return self._rename(key, self.rows, "key")

    def to_stored(self, key: str) -> str:
        """The key in the files of a runtime name.

        Args:
            key: A name of `Mistral3ForConditionalGeneration`.

        Raises:
            LayoutError: When the layout has no place for it, such as for the vision tower in a text-only folder.
        """
        return self._rename(key, tuple((runtime, stored) for stored, runtime in self.rows), "runtime name")

    def covers(self, key: str) -> bool:
        """Whether a stored key is one of this layout, skipped ones included."""
        return self.skips(key) or any(_regex(stored).fullmatch(key) for stored, _ in self.rows)

    def skips(self, key: str) -> bool:
        """Whether a stored key is one that is no part of the model."""
        return any(_regex(stored).fullmatch(key) for stored in self.skipped)

    def interleaves(self, name: str) -> bool:
        """Whether the rows of a runtime weight are stored interleaved."""
        return any(_regex(runtime).fullmatch(name) for runtime in self.interleaved)

    def _rename(self, key: str, rows: tuple[tuple[str, str], ...], what: str) -> str:
        for source, target in rows:
            if match := _regex(source).fullmatch(key):
                return re.sub(r"[*#]", "{}", target).format(*match.groups())
        raise LayoutError(
            f"{key}: no {what} of the {self.name} layout; it has {', '.join(source for source, _ in rows)}"
        )


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(.+)").replace(r"\#", "([0-9]+)"))


_TOWER = ("embed_tokens.*", "layers.#.*", "norm.*")

NESTED = Layout(
    "nested",
    (
        *((f"language_model.model.{part}", f"model.language_model.{part}") for part in _TOWER),
        ("vision_tower.*", "model.vision_tower.*"),
        ("multi_modal_projector.*", "model.multi_modal_projector.*"),
        ("language_model.lm_head.*", "lm_head.*"),
    ),
)
"""As Ministral-3 and Devstral-Small-2 are released."""

IDENTITY = Layout(
    "identity",
    (
        *((f"model.language_model.{part}", f"model.language_model.{part}") for part in _TOWER),
        ("model.vision_tower.*", "model.vision_tower.*"),
        ("model.multi_modal_projector.*", "model.multi_modal_projector.*"),
        ("lm_head.*", "lm_head.*"),
    ),
)
"""As Mistral-Medium-3.5 is released: stored names are the runtime ones."""

TEXT_ONLY = Layout(
    "text-only",
    (
        *((f"model.{part}", f"model.language_model.{part}") for part in _TOWER),
        ("lm_head.*", "lm_head.*"),
        ("score.*", "score.*"),
    ),
)
"""As Devstral-2 is released: `Ministral3ForCausalLM`, or a classifier with a `score` head."""

BARE = Layout("bare tower", tuple((part, f"model.language_model.{part}") for part in _TOWER))
"""A text tower or embedder saved on its own."""

_TEXT_LAYER, _NATIVE_LAYER = "model.language_model.layers.#.", "layers.#."
_VISION_LAYER, _NATIVE_VISION_LAYER = "model.vision_tower.transformer.layers.#.", "vision_encoder.transformer.layers.#."
_ATTENTION = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
_FEED_FORWARD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_QUANTISED = {"weight": "weight", "weight_scale_inv": "qscale_weight", "activation_scale": "qscale_act"}

NATIVE = Layout(
    "native",
    (
        ("tok_embeddings.weight", "model.language_model.embed_tokens.weight"),
        ("norm.weight", "model.language_model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        (f"{_NATIVE_LAYER}attention_norm.weight", f"{_TEXT_LAYER}input_layernorm.weight"),
        (f"{_NATIVE_LAYER}ffn_norm.weight", f"{_TEXT_LAYER}post_attention_layernorm.weight"),
        *(
            (f"{_NATIVE_LAYER}{stored_block}.{stored}.{stored_last}", f"{_TEXT_LAYER}{block}.{name}.{last}")
            for stored_block, block, names in (
                ("attention", "self_attn", _ATTENTION),
                ("feed_forward", "mlp", _FEED_FORWARD),
            )
            for name, stored in names.items()
            for last, stored_last in _QUANTISED.items()
        ),
        (f"{_NATIVE_VISION_LAYER}attention_norm.weight", f"{_VISION_LAYER}attention_norm.weight"),
        (f"{_NATIVE_VISION_LAYER}ffn_norm.weight", f"{_VISION_LAYER}ffn_norm.weight"),
        *(
            (f"{_NATIVE_VISION_LAYER}{block}.{stored}.weight", f"{_VISION_LAYER}{block}.{name}.weight")
            for block, names in (("attention", _ATTENTION), ("feed_forward", _FEED_FORWARD))
            for name, stored in names.items()
        ),
        ("vision_encoder.ln_pre.weight", "model.vision_tower.ln_pre.weight"),
        ("vision_encoder.patch_conv.weight", "model.vision_tower.patch_conv.weight"),
        ("vision_language_adapter.w_in.*", "model.multi_modal_projector.linear_1.*"),
        ("vision_language_adapter.w_out.*", "model.multi_modal_projector.linear_2.*"),
        ("patch_merger.merging_layer.weight", "model.multi_modal_projector.patch_merger.merging_layer.weight"),
        ("pre_mm_projector_norm.weight", "model.multi_modal_projector.norm.weight"),
    ),
    skipped=("*fake_quantizer*",),
    interleaved=tuple(
        f"{block}.{name}.weight"
        for block in (f"{_TEXT_LAYER}self_attn", f"{_VISION_LAYER}attention")
        for name in ("q_proj", "k_proj")
    ),
)
"""Mistral's own names and row order: `consolidated*.safetensors` beside `params.json`.

Source: `convert_ministral3_weights_to_hf.py` of transformers.
"""

LAYOUTS = (NESTED, IDENTITY, TEXT_ONLY, BARE, NATIVE)
_NAMES = ", ".join(layout.name for layout in LAYOUTS)

SCALE, ACTIVATION_SCALE = "weight_scale_inv", "activation_scale"
"""What runtime names call the scale of a weight (it multiplies) and of its static activations."""

TEXT_LINEAR = re.compile(r"model\.language_model\.layers\.[0-9]+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
"""Runtime names of the weights that released FP8 folders store as F8_E4M3: the seven linears of every text layer."""


def recognise(keys: Iterable[str]) -> Layout:
    """Finds the layout of a folder by the keys in its files.

    Args:
        keys: Every key of the folder, as often as it is stored.

    Returns:
        The layout whose rows cover all keys.

    Raises:
        LayoutError: When there is no key, a key is stored twice, no layout covers all keys, or more than one does (a
            head alone).
    """
    counts = Counter(list(keys))  # a list: Counter would take the values of a mapping for counts
    if not counts:
        raise LayoutError("keys: the folder has no tensor, expected the weights of a Mistral-3 model")
    if doubled := [key for key, count in counts.items() if count > 1]:
        raise LayoutError(f"keys: stored more than once: {shorten(doubled)}; keep one copy of the weights")
    unmatched = {layout: [key for key in counts if not layout.covers(key)] for layout in LAYOUTS}
    fitting = [layout for layout in LAYOUTS if not unmatched[layout]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(layout.name for layout in fitting)
        raise LayoutError(f"keys: {shorten(list(counts))} fit the layouts {names}; expected a text tower too")
    nearest = min(LAYOUTS, key=lambda layout: len(unmatched[layout]))
    raise LayoutError(
        f"keys: no layout covers all {len(counts)} keys; tried {_NAMES}. Nearest is {nearest.name}, without a place "
        f"for {len(unmatched[nearest])}: {shorten(unmatched[nearest])}"
    )

"""How the tensors of a weights folder are named: the layouts as tables, and `recognise(keys)` that tells which it is.

Reading the tensors is left to others. The idea: a layout is a property of the files, not of the model, so it is found
from the keys alone: it is the one layout whose rows cover every key. Each row pairs a stored pattern with a runtime
one, and runtime names are the same for all layouts (those of `Mistral3ForConditionalGeneration`), so a key goes from
any layout to any other through them:

    runtime = NESTED.to_runtime("language_model.model.layers.0.mlp.up_proj.weight")
    assert BARE.to_stored(runtime) == "layers.0.mlp.up_proj.weight"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ostro.errors import LayoutError

_MAX_LISTED = 10


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a Mistral-3 model.

    Attributes:
        name: As users and messages call it.
        rows: Stored and runtime pattern of each part; `*` stands for the same non-empty text in both, `#` for the same
            number.
    """

    name: str
    rows: tuple[tuple[str, str], ...]

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
        """Whether a stored key is one of this layout."""
        return any(_regex(stored).fullmatch(key) for stored, _ in self.rows)

    def _rename(self, key: str, rows: tuple[tuple[str, str], ...], what: str) -> str:
        for source, target in rows:
            if match := _regex(source).fullmatch(key):
                return re.sub(r"[*#]", "{}", target).format(*match.groups())
        raise LayoutError(
            f"{key}: no {what} of the {self.name} layout; it has {', '.join(source for source, _ in rows)}"
        )


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

LAYOUTS = (NESTED, IDENTITY, TEXT_ONLY, BARE)
_NAMES = ", ".join(layout.name for layout in LAYOUTS)

TEXT_LINEAR = re.compile(r"model\.language_model\.layers\.[0-9]+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
"""Runtime names of the weights that released FP8 folders store as F8_E4M3: the seven linears of every text layer."""

# Mistral's own names (`params.json`, `consolidated*.safetensors`): a folder with this key has them throughout.
_NATIVE_KEY = "tok_embeddings.weight"


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
    if _NATIVE_KEY in counts:
        raise LayoutError(
            f"{_NATIVE_KEY}: the keys are in Mistral's native layout, expected a Hugging Face one ({_NAMES}); "
            "use model*.safetensors and config.json of the same release"
        )
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


def shorten(keys: Sequence[str]) -> str:
    """Up to ten keys, sorted, for a message.

    Args:
        keys: Any number of keys.
    """
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(sorted(keys)[:_MAX_LISTED]) + more

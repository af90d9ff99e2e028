"""Between the weights of a model and the tensors of its folder: `from_hf(stored)`, `to_hf(state_dict)`, on plain dicts.

Reading and writing files is left to `ostro.checkpoint`. The idea: the two differ in three ways, each known from what is
stored and not from the model's size or from how names end.

* Names and order of rows are those of the folder's layout (`layout`).
* A tensor is FP8 if it is stored as such. Its real values are the stored ones times its scale; without one they mean
  nothing, so an FP8 tensor and its scale come together or not at all. For writing, which tensors are FP8 was recorded
  from the folder (`bound`); before there is a folder, they are the linears of the model that
  `quantization_config.modules_to_not_convert` does not except.
* Static activation scales are no part of training. They are kept aside and handed back when writing.

Tensors whose bytes did not change in between come back byte by byte (see `ostro.fp8.quantize.requantize`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration, PreTrainedConfig

from ostro.errors import LayoutError, shorten
from ostro.fp8.quantize import FP8_DTYPE, check_scale_shape, dequantize, quantize, requantize
from ostro.models.layout import ACTIVATION_SCALE, IDENTITY, NESTED, SCALE, TEXT_ONLY, Layout, recognise

_HEAD = "lm_head.weight"
_VISION = "model.vision_tower."


@dataclass(frozen=True)
class StoredKeys:
    """Which stored key holds what of a model, by the runtime name of the weight.

    Attributes:
        layout: How the folder names its tensors.
        weights: Key of every weight.
        scales: Key of the scale of every FP8 weight, and only of those.
        activation_scales: Key of the static activation scale, where there is one.
    """

    layout: Layout
    weights: Mapping[str, str]
    scales: Mapping[str, str]
    activation_scales: Mapping[str, str]


def match_keys(keys: Iterable[tuple[str, bool, tuple[int, ...]]], layout: Layout | None = None) -> StoredKeys:
    """Finds the layout of a folder's tensors and pairs each FP8 weight with its scale.

    Args:
        keys: Stored key, whether it is stored as FP8, and shape, of every tensor.
        layout: The layout, where it is known.

    Raises:
        LayoutError: When no layout fits; when an FP8 tensor has no scale, a scale no FP8 tensor, or a scale's name is
            not one of the family's, such as `weight_scale`; when the shape of a scale does not fit its weight.
    """
    keys = list(keys)
    layout = layout or recognise(key for key, _, _ in keys)
    entries = {key: (is_fp8, shape) for key, is_fp8, shape in keys}
    weights: dict[str, str] = {}
    scales: dict[str, str] = {}
    activation_scales: dict[str, str] = {}
    unknown = []
    for key in entries:
        if layout.skips(key):
            continue
        name = layout.to_runtime(key)
        module, _, last = name.rpartition(".")
        if last == SCALE:
            scales[f"{module}.weight"] = key
        elif last == ACTIVATION_SCALE:
            activation_scales[f"{module}.weight"] = key
        elif "scale" in last:
            unknown.append(key)
        else:
            weights[name] = key
    if unknown:
        raise LayoutError(
            f"keys: scales of an unknown name: {shorten(unknown)}; expected {SCALE}, which multiplies, and "
            f"{ACTIVATION_SCALE}; rename them if that is what they are"
        )
    _check_pairs(entries, StoredKeys(layout, weights, scales, activation_scales))
    return StoredKeys(layout, weights, scales, activation_scales)


def _check_pairs(entries: Mapping[str, tuple[bool, tuple[int, ...]]], keys: StoredKeys) -> None:
    fp8 = {name for name, key in keys.weights.items() if entries[key][0]}
    if bare := [keys.weights[name] for name in fp8 - keys.scales.keys()]:
        raise LayoutError(
            f"keys: {len(bare)} FP8 weights without their {SCALE}: {shorten(bare)}; without it their values mean "
            "nothing, download or export the folder again"
        )
    for found in (keys.scales, keys.activation_scales):
        if lone := [key for name, key in found.items() if name not in fp8]:
            raise LayoutError(
                f"keys: {len(lone)} scales of weights that are absent or not stored as FP8: {shorten(lone)}; "
                "download or export the folder again"
            )
    for name, key in keys.scales.items():
        try:
            check_scale_shape(entries[key][1], entries[keys.weights[name]][1])
        except ValueError as error:
            raise LayoutError(f"{key}: {error}") from error


class Mistral3FP8StateDictAdapter:
    """Between the state dict of a model and the tensors of a folder, for one layout and one set of FP8 weights.

    Attributes:
        layout: How the folder names its tensors.
        scales: Scale of each FP8 weight as it was stored, by the runtime name of the weight; empty before `bound`.
        activation_scales: Static activation scales, likewise.
        quantization_config: Of the folder's `config.json`; None for a folder without.
        is_tied: Whether the head is the embedding, and so not stored.
    """

    def __init__(
        self, *, layout: Layout, names: Layout, model_class: type[Any], config: PreTrainedConfig | None = None
    ) -> None:
        """Use `for_vlm_full` or `for_causal_lm`.

        Args:
            layout: How the folder names its tensors.
            names: How the model names its parameters.
            model_class: Of transformers; its linears are the ones that may be FP8.
            config: Of the model.
        """
        self.layout = layout
        self.scales: dict[str, torch.Tensor] = {}
        self.activation_scales: dict[str, torch.Tensor] = {}
        self.quantization_config = _quantization_of(config)
        self.is_tied = bool(config is not None and config.to_dict().get("tie_word_embeddings", False))
        self._names, self._model_class, self._config = names, model_class, copy.deepcopy(config)
        self._fp8_names: frozenset[str] | None = None

    @classmethod
    def for_vlm_full(cls, config: PreTrainedConfig | None = None) -> Mistral3FP8StateDictAdapter:
        """For a whole vision-language model, in the layout of the released ones (nested) until it is bound to a folder.

        Args:
            config: `Mistral3Config`, with `quantization_config` for an FP8 model; what depends on it needs it.
        """
        return cls(layout=NESTED, names=IDENTITY, model_class=Mistral3ForConditionalGeneration, config=config)

    @classmethod
    def for_causal_lm(cls, config: PreTrainedConfig | None = None) -> Mistral3FP8StateDictAdapter:
        """For `Ministral3ForCausalLM`, in the text-only layout.

        Args:
            config: `Ministral3Config`, with `quantization_config` for an FP8 model; what depends on it needs it.
        """
        return cls(layout=TEXT_ONLY, names=TEXT_ONLY, model_class=Ministral3ForCausalLM, config=config)

    def bound(
        self,
        *,
        layout: Layout,
        scales: Mapping[str, torch.Tensor],
        activation_scales: Mapping[str, torch.Tensor],
        is_tied: bool,
    ) -> Mistral3FP8StateDictAdapter:
        """The adapter of one folder.

        Args:
            layout: How it names its tensors.
            scales: Scale of every FP8 weight as stored, by the runtime name (identity layout) of the weight.
            activation_scales: Static activation scales, likewise.
            is_tied: Whether the head is the embedding, and so not stored.
        """
        adapter = copy.copy(self)
        adapter.layout, adapter.is_tied = layout, is_tied
        adapter.scales, adapter.activation_scales = dict(scales), dict(activation_scales)
        adapter._fp8_names = frozenset(scales)
        return adapter

    @property
    def fp8_names(self) -> frozenset[str]:
        """Runtime names (identity layout) of the weights that the folder stores as FP8.

        Raises:
            LayoutError: When neither a folder nor a config says so.
        """
        if self._fp8_names is None:
            self._fp8_names = self._fp8_from_config()
        return self._fp8_names

    def from_hf(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of the model from the tensors of a folder: renamed, dequantised to bfloat16, rows in its order.

        Args:
            stored: All tensors of the folder, or any of a bound adapter's, by stored key. What is not FP8 is kept as
                it is.

        Returns:
            By parameter name of the model. Activation scales are left out.

        Raises:
            LayoutError: As `match_keys`; when a tensor has no place in the model.
        """
        forms = ((key, tensor.dtype == FP8_DTYPE, tuple(tensor.shape)) for key, tensor in stored.items())
        keys = match_keys(forms, self.layout if self._fp8_names is not None else None)
        weights = {}
        for name, key in keys.weights.items():
            weight = stored[key]
            if name in keys.scales:
                weight = dequantize(weight, stored[keys.scales[name]])
            if keys.layout.interleaves(name):
                weight = to_runtime_rows(weight, self.head_dim(name))
            weights[self._names.to_stored(name)] = weight
        return weights

    def to_hf(self, state_dict: Mapping[str, torch.Tensor], *, quantization: bool = False) -> dict[str, torch.Tensor]:
        """Tensors of a folder from the weights of a model; a tied head is left out.

        Args:
            state_dict: By parameter name of the model.
            quantization: Whether to write FP8 weights as FP8, with their scales, rather than as they are.

        Returns:
            By stored key. With `quantization`, weights whose values did not change have the bytes and the scale they
            were read from; others get new scales in the form of the old ones, or one per tensor where there was none.

        Raises:
            LayoutError: When a weight has no place in the layout; as `fp8_names`.
        """
        stored: dict[str, torch.Tensor] = {}
        for fqn, tensor in state_dict.items():
            stored.update(self.convert_single_tensor_to_hf(fqn, tensor, quantization=quantization))
        return stored

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, *, quantization: bool = False
    ) -> list[tuple[str, torch.Tensor]]:
        """What is stored for one weight of a model; `to_hf` tensor by tensor.

        Args:
            fqn: Parameter name of the model.
            tensor: The weight.
            quantization: As in `to_hf`.

        Returns:
            Stored key and tensor of the weight, and with `quantization` of its scales; nothing for a tied head.

        Raises:
            LayoutError: As `to_hf`.
        """
        name = self._names.to_runtime(fqn)
        if name == _HEAD and self.is_tied:
            return []
        key = self.layout.to_stored(name)
        if self.layout.interleaves(name):
            tensor = to_stored_rows(tensor, self.head_dim(name))
        if not quantization or name not in self.fp8_names:
            return [(key, tensor)]
        weight, scale = requantize(tensor, self.scales[name]) if name in self.scales else quantize(tensor)
        module = name.removesuffix("weight")
        pairs = [(key, weight), (self.layout.to_stored(module + SCALE), scale)]
        if name in self.activation_scales:
            pairs.append((self.layout.to_stored(module + ACTIVATION_SCALE), self.activation_scales[name]))
        return pairs

    def head_dim(self, name: str) -> int:
        """Rows of one attention head in a q or k weight.

        Args:
            name: Runtime name (identity layout) of the weight.

        Raises:
            LayoutError: When the adapter has no config to tell it.
        """
        if self._config is None:
            raise LayoutError(f"{name}: the order of its rows depends on the config; give it to the adapter")
        config: Any = self._config
        part = config.vision_config if name.startswith(_VISION) else config.get_text_config()
        return int(part.head_dim or part.hidden_size // part.num_attention_heads)

    def _fp8_from_config(self) -> frozenset[str]:
        if self._config is None:
            raise LayoutError("fp8_names: neither a folder nor a config says which weights are FP8; give one")
        if self.quantization_config is None:
            return frozenset()
        config = copy.deepcopy(self._config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            model = self._model_class(config)
        excepted = self.quantization_config.get("modules_to_not_convert") or ()
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        return frozenset(
            self._names.to_runtime(f"{name}.weight")
            for name in linears
            if not any(_is_inside(name, module) for module in excepted)
        )


def _is_inside(name: str, module: str) -> bool:
    """Whether a module is another or a part of it; like transformers, by its whole path or by the end of it."""
    return name == module or name.startswith(f"{module}.") or name.endswith(f".{module}")


def _quantization_of(config: PreTrainedConfig | None) -> dict[str, Any] | None:
    """A config's `quantization_config`, which transformers keeps as a dict or as an object, as plain data."""
    quantization = None if config is None else vars(config).get("quantization_config")
    if quantization is None:
        return None
    return copy.deepcopy(dict(quantization)) if isinstance(quantization, Mapping) else quantization.to_dict()


def to_runtime_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A q or k weight stored interleaved, in the order of rows that transformers rotates.

    Args:
        weight: `[num_heads * head_dim, in]`, of any type; whole heads.
        head_dim: Rows of one head.

    Returns:
        The same shape; row `j * head_dim / 2 + i` of a head is row `2 * i + j` of it before.
    """
    return weight.view(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_stored_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_runtime_rows`.

    Args:
        weight: `[num_heads * head_dim, in]`; whole heads.
        head_dim: Rows of one head.
    """
    return weight.view(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

"""Bytes on one rank at the worst moment of a step, by part of the model and by kind.

How a split comes about is left to `splits`, what a layer keeps to `towers`. The idea: what is there all the time
(weights, float32 masters, Adam's moments) and what grows (gradients, activations) is counted as `train.precision`,
`train.trainer` and `parallel.apply` hold it. A step passes through a few moments that can be the worst; each adds what
is there only then; the one with the largest sum is the peak. Gradients of earlier micro-batches count as there from
the beginning, as they are in all but the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ostro.losses.linear_ce import CHUNK_ROWS
from ostro.plan.shapes import Counts, Settings, build, full_name, split_dim
from ostro.plan.towers import Tower, text_tower, vision_tower
from ostro.train.options import Part
from ostro.train.parts import part_of

Kind = Literal["weights", "masters", "moments", "gradients", "activations", "transient"]
KINDS: tuple[Kind, ...] = ("weights", "masters", "moments", "gradients", "activations", "transient")
"""What bytes are for: `transient` are gathered weights, gradients on their way, and buffers of the loss."""

Ledger = Counter[tuple[Part, Kind]]
"""Bytes by part and kind."""

_FLOAT32 = 4
_MOMENTS = 8
_BUCKET = 2**25  # entries, of parallel.collectives
_TILE = 2**22 * _FLOAT32  # of losses.tiled_head


@dataclass(frozen=True)
class Split:
    """Sizes of the axes of a mesh."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def num_ranks(self) -> int:
        """Their product."""
        return self.pp * self.dp_replicate * self.dp_shard * self.tp

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of them, that see other samples."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"pp {self.pp}, dp_replicate {self.dp_replicate}, dp_shard {self.dp_shard}, tp {self.tp}"


@dataclass(frozen=True)
class Usage:
    """Memory of a rank at its worst moment.

    Attributes:
        moment: When that is.
        ledger: Bytes by part and kind.
    """

    moment: str
    ledger: Mapping[tuple[Part, Kind], int]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.ledger.values())


@dataclass(frozen=True)
class Stage:
    """What a rank has of the model: its layers, and the ends that only the first and last stage of a pipeline have.

    Attributes:
        num_layers: Text layers.
        has_inputs: Vision side and embeddings.
        has_head: Last norm and head.
        num_in_flight: Micro-batches whose activations are kept at once.
    """

    num_layers: int
    has_inputs: bool = True
    has_head: bool = True
    num_in_flight: int = 1


class Sizes:
    """What all splits of a run share: weights counted and layers measured once for each size of `tp`.

    Attributes:
        settings: Of the run.
    """

    def __init__(self, settings: Settings) -> None:
        """Counts and measures when first asked."""
        self.settings = settings
        self._weights: list[tuple[str, torch.Tensor]] | None = None
        self._counts: dict[int, dict[Part, Counts]] = {}
        self._visions: dict[tuple[int, bool], Tower] = {}
        self._towers: dict[tuple[int, bool], tuple[Tower, Tower]] = {}

    def counts(self, tp: int) -> Mapping[Part, Counts]:
        """Weights by part on a rank that holds its share of `tp`, all layers included."""
        if self._weights is None:
            model = build(self.settings)
            self._weights = [(full_name(self.settings, name), weight) for name, weight in model.named_parameters()]
        if tp not in self._counts:
            found: dict[Part, Counts] = {}
            for name, weight in self._weights:
                size = weight.numel() // (1 if split_dim(self.settings, name, tp) is None else tp)
                trained, part = size * weight.requires_grad, part_of(name)
                found[part] = found.get(part, Counts()) + Counts(size, trained, trained)
            self._counts[tp] = found
        return self._counts[tp]

    def towers(self, tp: int, is_split: bool) -> tuple[Tower, Tower]:
        """The vision side and the text layers of such a rank."""
        if (tp, is_split) not in self._towers:
            vision = (tp if self.settings.tp_vision else 1, is_split)
            if vision not in self._visions:
                self._visions[vision] = vision_tower(self.settings, tp=vision[0], is_split=is_split)
            text = text_tower(self.settings, tp=tp, is_split=is_split)
            self._towers[tp, is_split] = self._visions[vision], text
        return self._towers[tp, is_split]


def _at(part: Part, kind: Kind, size: int) -> Ledger:
    return Counter({(part, kind): size})


def usage(sizes: Sizes, split: Split, stage: Stage) -> Usage:
    """What a rank of one stage holds at the worst moment of a step.

    Args:
        sizes: Of the run.
        split: Of the ranks.
        stage: Which part of the model the rank has.
    """
    rank = _Rank(sizes, split, stage)
    moments = rank.moments()
    moment = max(moments, key=lambda name: moments[name].total())
    ledger = {place: size for place, size in moments[moment].items() if size}
    return Usage(moment, ledger)


def whole_model(sizes: Sizes, split: Split) -> int:
    """Bytes of the model that rank 0 holds besides on its device, to evaluate it, where the trained one is split.

    Args:
        sizes: Of the run.
        split: Of the ranks.
    """
    if split.dp_shard == split.tp == split.pp == 1 or not sizes.settings.evaluates:
        return 0
    return sum(weights.all for weights in sizes.counts(1).values()) * sizes.settings.dtype.itemsize


class _Rank:
    """The sums behind `usage`."""

    def __init__(self, sizes: Sizes, split: Split, stage: Stage) -> None:
        settings = sizes.settings
        self.sizes, self.settings, self.split, self.stage = sizes, settings, split, stage
        self.item = settings.dtype.itemsize
        self.is_split = split.dp_shard > 1
        self.vision, self.text = sizes.towers(split.tp, self.is_split)
        self.row = settings.num_tokens * settings.text_config.hidden_size * self.item
        counts = dict(sizes.counts(split.tp))
        num_layers = settings.text_config.num_hidden_layers
        self.layer = counts["language_model"].shared(num_layers)
        vision: Any = None if settings.is_embedder else vars(settings.config)["vision_config"]
        self.vision_layer = counts.get("vision", Counts()).shared(vision.num_hidden_layers if vision else 1)
        self.head = counts.get("embeddings" if settings.is_tied else "head", Counts())
        if settings.is_embedder or not stage.has_head:
            self.head = Counts()
        counts["language_model"] = self.layer.times(stage.num_layers)
        if not stage.has_inputs:
            for part in ("vision", "projector", *(() if settings.is_tied and stage.has_head else ("embeddings",))):
                counts.pop(part, None)
        if not stage.has_head:
            counts.pop("head", None)
        self.counts: dict[Part, Counts] = counts

    def standing(self) -> Ledger:
        """What is there at every moment of a step, gradients of earlier micro-batches included."""
        ledger: Ledger = Counter()
        shards = self.split.dp_shard
        for part, weights in self.counts.items():
            sharded = weights.sharded(self.settings) if self.is_split else 0
            ledger[part, "weights"] = (weights.all - sharded) * self.item + sharded * _FLOAT32 // shards
            if not self.is_split and self.item < _FLOAT32:
                ledger[part, "masters"] = weights.trained * _FLOAT32
            ledger[part, "moments"] = weights.trained * _MOMENTS // shards
            ledger[part, "gradients"] = weights.trained * _FLOAT32 // shards
        return ledger

    def moments(self) -> dict[str, Ledger]:
        """Bytes at each moment that can be the worst."""
        found: dict[str, Ledger] = {}
        ledger = self.standing() + self.gathered_root()
        if self.stage.has_inputs and self.vision.forward:
            kept = _at("vision", "activations", self.kept_by_vision() + self.vision.forward)
            found["forward pass of the vision tower"] = ledger + kept + self.gathered(self.vision_layer, "vision")
        full = ledger + self.kept(self.stage.num_in_flight)
        text = _at("language_model", "activations", self.text.forward)
        found["forward pass of the text layers"] = full + text + self.gathered(self.layer, "language_model")
        if self.settings.is_embedder:
            found["loss"] = full + _at("language_model", "transient", self.contrastive_loss())
            # every rank has loaded the whole tower by then
            each = _FLOAT32 if self.is_split else self.item
            found["set-up, before the weights are split"] = Counter(
                {(part, "weights"): weights.all * each for part, weights in self.sizes.counts(1).items()}
            )
        if self.head.all:
            found["loss"] = full + _at("head", "transient", self.loss())
        pending = _at("head", "transient", self.pending_head())
        text = _at("language_model", "activations", self.text.backward)
        found["backward pass of the text layers"] = full + pending + text + self.reduced(self.layer, "language_model")
        if self.stage.has_inputs and self.vision.backward:
            kept = _at("vision", "activations", self.kept_by_vision() + self.vision.backward)
            back = self.reduced(self.vision_layer, "vision")
            found["backward pass of the vision tower"] = ledger + pending + kept + back
        found["end of the backward pass"] = ledger + self.kept(self.stage.num_in_flight - 1) + self.last_reduction()
        return found

    def kept_by_vision(self) -> int:
        """Activations of the vision side, and pixels."""
        if not self.settings.num_patches:
            return 0
        vision: Any = vars(self.settings.config)["vision_config"]
        pixels: int = self.settings.num_patches * vision.num_channels * vision.patch_size**2 * _FLOAT32
        return pixels + self.vision.kept(vision.num_hidden_layers)

    def kept(self, num_micro_batches: int) -> Ledger:
        """Activations of whole micro-batches between their forward and their backward pass."""
        ledger: Ledger = Counter()
        ledger["language_model", "activations"] = self.text.kept(self.stage.num_layers)
        if self.stage.has_inputs:
            ledger["vision", "activations"] = self.kept_by_vision()
            # with images, the embeddings before and after they are put in, and where
            ledger["embeddings", "activations"] = self.row * (2 if self.settings.num_patches else 1)
        return Counter({place: size * num_micro_batches for place, size in ledger.items()})

    def loss(self) -> int:
        """Buffers of the fused loss: those of its forward pass, or those of its backward pass."""
        rows = self.settings.num_tokens
        tile = min(_TILE, self.head.all * _FLOAT32) if self.settings.device == "cpu" and self.item < _FLOAT32 else 0
        vocabulary = self.head.all // self.settings.text_config.hidden_size
        chunk = min(CHUNK_ROWS, rows) * vocabulary * _FLOAT32 + tile
        # of a head that ranks share, the hidden gradient is summed over them in float32
        wide = _FLOAT32 // self.item if self.split.tp > 1 else 1
        kept = self.row * wide + self.head.trained * _FLOAT32
        return kept + max(chunk, self.row + self.head.trained * self.item)

    def contrastive_loss(self) -> int:
        """Vectors of all texts, their gradients and what was gathered; the similarities of a rank, a few times over."""
        queries, documents = self.settings.num_texts
        vectors = (queries + documents) * self.settings.text_config.hidden_size
        return 3 * vectors * _FLOAT32 + 4 * queries // self.split.num_data_ranks * documents * _FLOAT32

    def pending_head(self) -> int:
        """The head's gradient where it waits for the end of the backward pass: for the embedding's, or the others'."""
        return self.head.trained * self.item if self.settings.is_tied or self.is_split else 0

    def gathered_root(self) -> Ledger:
        """Weights outside the layers, which FSDP gathers once for a whole step."""
        if not self.is_split:
            return Counter()
        parts = {part: weights for part, weights in self.counts.items() if part not in ("language_model", "vision")}
        sharded = {part: weights.sharded(self.settings) for part, weights in parts.items()}
        return Counter({(part, "transient"): number * self.item for part, number in sharded.items()})

    def gathered(self, layer: Counts, part: Part) -> Ledger:
        """A layer's weights in its forward pass: as they arrived from the ranks, and as they are used."""
        sharded = layer.sharded(self.settings)
        return _at(part, "transient", 2 * sharded * self.item) if self.is_split else Counter()

    def reduced(self, layer: Counts, part: Part) -> Ledger:
        """Weights of a layer and of the next in its backward pass, and the gradients of the one before on their way."""
        if not self.is_split:
            return Counter()
        sharded = layer.sharded(self.settings)
        return _at(part, "transient", 2 * sharded * self.item + layer.trained * _FLOAT32)

    def last_reduction(self) -> Ledger:
        """What it takes to bring together the gradients that are complete at the end only."""
        if self.is_split:
            rest = [part for part in self.counts if part not in ("language_model", "vision")]
            each = self.item + _FLOAT32 + _FLOAT32 / self.split.dp_shard
            return Counter({(part, "transient"): int(self.counts[part].trained * each) for part in rest})
        embedding = self.counts.get("embeddings", Counts()).trained * self.item
        ledger: Ledger = _at("embeddings", "transient", embedding + self.pending_head())
        if self.split.dp_replicate > 1:
            largest = max(self.counts, key=lambda part: self.counts[part].largest)
            trained = sum(weights.trained for weights in self.counts.values())
            bucket = max(self.counts[largest].largest, min(_BUCKET, trained)) * _FLOAT32
            ledger = max(ledger, _at(largest, "transient", bucket), key=Counter.total)
        return ledger

"""Bytes on one rank at the worst moment of a step, by part of the model and by kind.

How a split comes about is left to `splits`, what a layer keeps to `towers`. The idea: what is there all the time
(weights, float32 masters, Adam's moments) and what grows (gradients, activations) is counted as `train.precision`,
`train.trainer` and `parallel.apply` hold it. A step passes through a few moments that can be the worst; each adds what
is there only then; the one with the largest sum is the peak. Gradients are there from the first backward pass on; in
that one they grow while activations go.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ostro.losses.linear_ce import CHUNK_ROWS
from ostro.plan.orders import Turn
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
    """Consecutive layers, and the ends that only the first and last stage of a pipeline have.

    Attributes:
        num_layers: Text layers.
        has_inputs: Vision side and embeddings.
        has_head: Last norm and head.
    """

    num_layers: int
    has_inputs: bool = True
    has_head: bool = True


@dataclass(frozen=True)
class Share:
    """What a rank has of the model, and how it works through a step.

    Attributes:
        stages: Its stages; one that is the whole model without a pipeline.
        turns: All that differ.
    """

    stages: tuple[Stage, ...]
    turns: frozenset[Turn]


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
        self._texts: dict[tuple[int, bool, bool, bool], Tower] = {}

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

    def vision(self, tp: int, is_split: bool) -> Tower:
        """The vision side of such a rank."""
        key = (tp if self.settings.tp_vision else 1, is_split)
        if key not in self._visions:
            self._visions[key] = vision_tower(self.settings, tp=key[0], is_split=is_split)
        return self._visions[key]

    def text(self, tp: int, is_split: bool, stage: Stage) -> Tower:
        """The text layers of such a rank, as they are in a stage."""
        # another stage wants the gradient of what it sent, whatever trains
        has_gradient = not stage.has_inputs or not {"vision", "projector", "embeddings"} <= self.settings.frozen
        key = (tp, is_split, has_gradient, stage.has_head)
        if key not in self._texts:
            self._texts[key] = text_tower(
                self.settings, tp=tp, is_split=is_split, has_gradient=has_gradient, has_norm=stage.has_head
            )
        return self._texts[key]


def _at(part: Part, kind: Kind, size: int) -> Ledger:
    return Counter({(part, kind): size})


def _times(ledger: Ledger, number: int) -> Ledger:
    return Counter({place: size * number for place, size in ledger.items()})


def usage(sizes: Sizes, split: Split, share: Share) -> Usage:
    """What a rank holds at the worst moment of a step.

    Args:
        sizes: Of the run.
        split: Of the ranks.
        share: Which part of the model the rank has.
    """
    rank = _Rank(sizes, split, share)
    moments = rank.moments()
    moment = max(moments, key=lambda name: moments[name].total())
    ledger = {place: size for place, size in moments[moment].items() if size}
    return Usage(moment, ledger)


class _Rank:
    """The sums behind `usage`."""

    def __init__(self, sizes: Sizes, split: Split, share: Share) -> None:
        settings = sizes.settings
        self.sizes, self.settings, self.split, self.share = sizes, settings, split, share
        self.item = settings.dtype.itemsize
        self.is_split = split.dp_shard > 1
        self.vision = sizes.vision(split.tp, self.is_split)
        self.row = settings.num_tokens * settings.text_config.hidden_size * self.item
        counts = dict(sizes.counts(split.tp))
        num_layers = settings.text_config.num_hidden_layers
        self.layer = counts["language_model"].shared(num_layers)
        vision: Any = None if settings.is_embedder else vars(settings.config)["vision_config"]
        self.vision_layer = counts.get("vision", Counts()).shared(vision.num_hidden_layers if vision else 1)
        self.head = counts.get("embeddings" if settings.is_tied else "head", Counts())
        has_inputs, has_head = share.stages[0].has_inputs, share.stages[-1].has_head
        if settings.is_embedder or not has_head:
            self.head = Counts()
        counts["language_model"] = self.layer.times(sum(stage.num_layers for stage in share.stages))
        if not has_inputs:
            for part in ("vision", "projector", *(() if settings.is_tied and has_head else ("embeddings",))):
                counts.pop(part, None)
        if not has_head:
            counts.pop("head", None)
        self.counts: dict[Part, Counts] = counts

    def standing(self) -> Ledger:
        """What is there at every moment of a step."""
        ledger: Ledger = Counter()
        shards = self.split.dp_shard
        for part, weights in self.counts.items():
            sharded = weights.sharded(self.settings) if self.is_split else 0
            ledger[part, "weights"] = (weights.all - sharded) * self.item + sharded * _FLOAT32 // shards
            if not self.is_split and self.item < _FLOAT32:
                ledger[part, "masters"] = weights.trained * _FLOAT32
            ledger[part, "moments"] = weights.trained * _MOMENTS // shards
        return ledger + self.gathered_root()

    def gradients(self) -> Ledger:
        """What a backward pass leaves."""
        shards = self.split.dp_shard
        return Counter({(part, "gradients"): each.trained * _FLOAT32 // shards for part, each in self.counts.items()})

    def moments(self) -> dict[str, Ledger]:
        """Bytes at each moment that can be the worst."""
        found: dict[str, Ledger] = {}
        standing, gradients = self.standing(), self.gradients()
        for turn in self.worst_turns():
            stage, kept = self.share.stages[turn.stage], zip(self.share.stages, turn.others, strict=True)
            others = sum((_times(self.waiting(each), number) for each, number in kept), standing)
            before = others + gradients if turn.has_gradients else others
            passes = (
                self.forward(stage, before) if turn.is_forward else self.backward(stage, before, others + gradients)
            )
            for name, ledger in passes:
                found[name] = max(found.get(name, ledger), ledger, key=Counter.total)
        if self.settings.is_embedder and self.split.pp > 1:
            # between the two passes of a micro-batch, on all stages
            loss = _at("language_model", "transient", self.contrastive_loss())
            found["loss"] = standing + gradients + loss
        return found

    def worst_turns(self) -> Iterator[Turn]:
        """Of each stage and direction, without gradients and with, the one with most of other micro-batches."""
        kept = [self.waiting(stage).total() for stage in self.share.stages]
        worst: dict[tuple[bool, int, bool], Turn] = {}
        for turn in sorted(self.share.turns, key=lambda turn: sum(map(operator.mul, kept, turn.others))):
            worst[turn.is_forward, turn.stage, turn.has_gradients] = turn
        yield from worst.values()

    def text(self, stage: Stage) -> Tower:
        """The text layers of a stage."""
        return self.sizes.text(self.split.tp, self.is_split, stage)

    def forward(self, stage: Stage, others: Ledger) -> Iterator[tuple[str, Ledger]]:
        """Moments of a forward pass, over what is there before."""
        if stage.has_inputs:
            others = others + _at("vision", "activations", self.pixels())
        if stage.has_inputs and self.vision.forward:
            kept = _at("vision", "activations", self.kept_by_vision() + self.vision.forward)
            yield "forward pass of the vision tower", others + kept + self.gathered(self.vision_layer, "vision")
        full = others + self.activations(stage)
        text = _at("language_model", "activations", self.text(stage).forward)
        yield "forward pass of the text layers", full + text + self.gathered(self.layer, "language_model")
        if self.settings.is_embedder and self.split.pp == 1:
            yield "loss", full + _at("language_model", "transient", self.contrastive_loss())
        if stage.has_head and self.head.all:
            yield "loss", full + _at("head", "transient", self.loss())

    def backward(self, stage: Stage, before: Ledger, after: Ledger) -> Iterator[tuple[str, Ledger]]:
        """Moments of a backward pass: over what is there before without its activations, and what is there after."""
        pending = _at("head", "transient", self.pending_head() if stage.has_head else 0)
        text = _at("language_model", "activations", self.text(stage).backward)
        # another stage has sent the gradient
        received = _at("language_model", "transient", 0 if stage.has_head else self.row)
        text += self.reduced(self.layer, "language_model") + pending + received
        vision = _at("vision", "activations", self.kept_by_vision() if stage.has_inputs else 0)
        yield "backward pass of the text layers", before + self.activations(stage) + text
        last = _at("language_model", "activations", self.text(stage).kept(1))
        yield "backward pass of the text layers", after + vision + last + text
        if stage.has_inputs and self.vision.backward:
            back = _at("vision", "activations", self.vision.backward) + self.reduced(self.vision_layer, "vision")
            yield "backward pass of the vision tower", after + pending + vision + back
        yield "end of the backward pass", after + self.last_reduction()

    def pixels(self) -> int:
        """Images of a micro-batch as they come, which the vision tower casts; on the CPU they are the loader's."""
        if not self.settings.num_patches or self.settings.device == "cpu":
            return 0
        vision: Any = vars(self.settings.config)["vision_config"]
        size: int = self.settings.num_patches * vision.num_channels * vision.patch_size**2 * _FLOAT32
        return size

    def kept_by_vision(self) -> int:
        """Activations of the vision side."""
        if not self.settings.num_patches:
            return 0
        vision: Any = vars(self.settings.config)["vision_config"]
        as_they_come = self.pixels() if self.item == _FLOAT32 and self.vision.per_layer else 0
        return self.vision.kept(vision.num_hidden_layers) + as_they_come

    def activations(self, stage: Stage) -> Ledger:
        """Those of a stage for one micro-batch, from the end of its forward pass to its backward pass."""
        ledger = _at("language_model", "activations", self.text(stage).kept(stage.num_layers))
        # what the first layer reads: the embeddings, or what another stage sent
        ledger["embeddings" if stage.has_inputs else "language_model", "activations"] += self.row
        if stage.has_inputs:
            ledger["vision", "activations"] = self.kept_by_vision()
        return ledger

    def waiting(self, stage: Stage) -> Ledger:
        """What a stage keeps of a micro-batch while others are worked on: also gradients that the loss made forward."""
        return self.activations(stage) + _at("head", "transient", self.made_by_loss() if stage.has_head else 0)

    def made_by_loss(self) -> int:
        """Gradients of the fused loss between its forward and its backward pass."""
        if not self.head.all:
            return 0
        # of a head that ranks share, the hidden gradient is summed over them in float32
        wide = _FLOAT32 // self.item if self.split.tp > 1 else 1
        return self.row * wide + self.head.trained * _FLOAT32

    def loss(self) -> int:
        """Buffers of the fused loss: those of its forward pass, or those of its backward pass."""
        rows = self.settings.num_tokens
        tile = min(_TILE, self.head.all * _FLOAT32) if self.settings.device == "cpu" and self.item < _FLOAT32 else 0
        vocabulary = self.head.all // self.settings.text_config.hidden_size
        chunk = min(CHUNK_ROWS, rows) * vocabulary * _FLOAT32 + tile
        return self.made_by_loss() + max(chunk, self.row + self.head.trained * self.item)

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

"""Which examples and documents make up each global batch: decided from ids and a seed alone, the same on every rank.

Tokens and threads are left to `retrieval_collate` and `loader`. The idea: a batch depends on nothing but the seed, the
options and the number of batches before it, so a position is a few numbers, and a run can continue from it on another
number of ranks.

* A source is passed over again and again, each time in a new order. An epoch takes `weight * examples` from each
  source, in batches of one source each, the sources' batches in random order.
* A batch holds no document and no query twice: an example whose drawn positive is already there waits for the next
  batch of its source. Frequent documents can make more examples wait than fit; beyond a bound the oldest is left out.
* Which positive and which negatives an example shows is drawn anew in every pass, by a generator of its own.
* Documents known to answer a query are never drawn as its negatives. Where one comes into the batch through another
  query, it is listed in `known_positive_keys`, and the loss leaves it out.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ostro.data.corpus import document_key
from ostro.data.options import DataOptions
from ostro.data.retrieval import RetrievalExample, RetrievalSource
from ostro.errors import DataError, RecipeError

logger = logging.getLogger(__name__)

# In batches of examples. More would only let frequent documents' examples wait longer.
_MAX_WAITING_BATCHES = 8
# In batches of examples. A batch that is not full after so many, or after a whole pass, has run out of distinct
# documents and stays short.
_MAX_TRIED_BATCHES = 64


@dataclass(frozen=True)
class PlannedExample:
    """An example of a batch with the documents drawn for it.

    Attributes:
        example: The example.
        document_ids: The drawn positive, then the drawn negatives.
        document_keys: `document_key` of each.
        known_positive_keys: Keys of all documents of the global batch that are known to answer the query, its own
            positive included.
    """

    example: RetrievalExample
    document_ids: tuple[str, ...]
    document_keys: tuple[int, ...]
    known_positive_keys: tuple[int, ...]


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch.

    Attributes:
        source: Name of the one source it comes from.
        epoch: Epoch it belongs to, from 0.
        num_samples: Queries planned so far, this batch included.
        examples: In global order; rank r of W has a contiguous share of them.
    """

    source: str
    epoch: int
    num_samples: int
    examples: tuple[PlannedExample, ...]


class _Candidate(NamedTuple):
    """An example in some pass over its source, with what decides whether it fits into a batch."""

    pass_index: int
    row: int
    positive_key: int
    query_key: int


class _Stream:
    """The endless sequence of candidates of one source, and those that wait."""

    def __init__(self, source: RetrievalSource, number: int, options: DataOptions, seed: int) -> None:
        self.source = source
        self.waiting: deque[_Candidate] = deque()
        self.pass_index, self.position = 0, 0
        self._number, self._seed = number, seed
        self._shuffle = options.shuffle
        self._num_negatives = options.num_negatives
        self._max_waiting = _MAX_WAITING_BATCHES * options.global_batch_queries
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        self._has_reported = False

    def take(self, size: int) -> tuple[PlannedExample, ...]:
        """The next `size` examples without a repeated document or query; fewer if there are no more to be found."""
        chosen: list[tuple[_Candidate, RetrievalExample]] = []
        documents: set[int] = set()
        queries: set[int] = set()
        passed_over: deque[_Candidate] = deque()
        for _ in range(len(self.waiting) + min(_MAX_TRIED_BATCHES * size, len(self.source))):
            if len(chosen) == size:
                break
            candidate, example = (self.waiting.popleft(), None) if self.waiting else self._next()
            if candidate.positive_key in documents or candidate.query_key in queries:
                passed_over.append(candidate)
                continue
            documents.add(candidate.positive_key)
            queries.add(candidate.query_key)
            chosen.append((candidate, example or self.source[candidate.row]))
        self.waiting.extendleft(reversed(passed_over))
        if len(self.waiting) > self._max_waiting or len(chosen) < size:
            self._report(len(chosen), size)
        while len(self.waiting) > self._max_waiting:
            self.waiting.popleft()
        return self._draw(chosen, documents)

    def _next(self) -> tuple[_Candidate, RetrievalExample]:
        if self.position == len(self.source):
            self.pass_index, self.position = self.pass_index + 1, 0
        index = int(self._pass_order()[self.position])
        self.position += 1
        example = self.source[index]
        positive_id = self._draw_positive(example, self.pass_index, index)
        return _Candidate(self.pass_index, index, document_key(positive_id), document_key(example.query_id)), example

    def _draw(
        self, chosen: list[tuple[_Candidate, RetrievalExample]], documents: set[int]
    ) -> tuple[PlannedExample, ...]:
        """Draws negatives, after all positives are known, so that none of them repeats a document of the batch."""
        drawn = []
        for candidate, example in chosen:
            ids = [self._draw_positive(example, candidate.pass_index, candidate.row)]
            keys = [candidate.positive_key]
            if self._num_negatives and example.negative_ids:
                new = {document_key(negative_id): negative_id for negative_id in example.negative_ids}
                new = {key: negative_id for key, negative_id in new.items() if key not in documents}
                generator = self._generator("negatives", candidate.pass_index, candidate.row)
                sampled = generator.sample(list(new), min(self._num_negatives, len(new)))
                keys += sampled
                ids += [new[key] for key in sampled]
                documents.update(sampled)
            drawn.append((example, tuple(ids), tuple(keys)))
        return tuple(
            PlannedExample(
                example, ids, keys, tuple(sorted(documents.intersection(map(document_key, example.positive_ids))))
            )
            for example, ids, keys in drawn
        )

    def _draw_positive(self, example: RetrievalExample, pass_index: int, index: int) -> str:
        if len(example.positive_ids) == 1:
            return example.positive_ids[0]
        return self._generator("positive", pass_index, index).choice(example.positive_ids)

    def _generator(self, purpose: str, pass_index: int, index: int) -> random.Random:
        return random.Random(f"{self._seed}/{self._number}/{purpose}/{pass_index}/{index}")

    def _pass_order(self) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != self.pass_index:
            order = np.arange(len(self.source))
            if self._shuffle:
                np.random.default_rng([self._seed, 1, self._number, self.pass_index]).shuffle(order)
            self._order = (self.pass_index, order)
        return self._order[1]

    def _report(self, found: int, size: int) -> None:
        if self._has_reported:
            return
        self._has_reported = True
        if found < size:
            logger.warning(
                "%s: batches stay short, the first with %d of %d queries: no more different documents were found",
                self.source.name,
                found,
                size,
            )
        else:
            logger.info(
                "%s: not every query gets a turn in every pass: some documents answer more queries than there are "
                "batches, and none stands in a batch twice",
                self.source.name,
            )


class BatchPlan:
    """The endless sequence of global batches."""

    def __init__(self, sources: Sequence[RetrievalSource], options: DataOptions, *, seed: int) -> None:
        """Starts at the first batch.

        Args:
            sources: One for each entry of `options.train`, in order.
            options: Weights and batch size.
            seed: Decides every order and every draw, >= 0.

        Raises:
            RecipeError: When `drop_last` leaves nothing of a source.
        """
        self._options, self._seed = options, seed
        self._streams = [_Stream(source, number, options, seed) for number, source in enumerate(sources)]
        self._epoch_sizes = [
            max(round(entry.weight * len(source)), 1) for entry, source in zip(options.train, sources, strict=True)
        ]
        size = options.global_batch_queries
        self._batch_counts = [
            examples // size if options.drop_last else -(-examples // size) for examples in self._epoch_sizes
        ]
        if not all(self._batch_counts):
            number = self._batch_counts.index(0)
            raise RecipeError(
                f"data.drop_last: leaves nothing of data.train.{number}, {self._epoch_sizes[number]} examples per epoch"
                f"; lower data.global_batch_queries, now {size}, or set drop_last to false"
            )
        self._epoch, self._batch, self._num_samples = 0, 0, 0
        self._order = self._epoch_order()

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of one epoch, over all sources; the same in every epoch."""
        return sum(self._batch_counts)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0: how many are complete."""
        return self._epoch

    def next_batch(self) -> PlannedBatch:
        """Plans the next global batch.

        Raises:
            DataError: When a row of it is wrong.
        """
        epoch, number = self._epoch, int(self._order[self._batch])
        already = int((self._order[: self._batch] == number).sum()) * self._options.global_batch_queries
        size = min(self._options.global_batch_queries, self._epoch_sizes[number] - already)
        stream = self._streams[number]
        examples = stream.take(size)
        self._num_samples += len(examples)
        self._batch += 1
        if self._batch == len(self._order):
            self._epoch, self._batch = epoch + 1, 0
            self._order = self._epoch_order()
        return PlannedBatch(stream.source.name, epoch, self._num_samples, examples)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers and lists; it does not depend on the number of ranks."""
        return {
            "made_for": self._made_for(),
            "epoch": self._epoch,
            "batch": self._batch,
            "num_samples": self._num_samples,
            "streams": [
                {"pass": stream.pass_index, "position": stream.position, "waiting": list(map(list, stream.waiting))}
                for stream in self._streams
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position.

        Raises:
            DataError: When the position was saved with other sources, another seed or another batch size.
        """
        now = self._made_for()
        for name, then in state["made_for"].items():
            if then != now[name]:
                raise DataError(
                    f"{name}: the saved position was made with {then}, got {now[name]}; resume with what it was"
                )
        self._epoch, self._batch, self._num_samples = state["epoch"], state["batch"], state["num_samples"]
        self._order = self._epoch_order()
        for stream, position in zip(self._streams, state["streams"], strict=True):
            stream.pass_index, stream.position = position["pass"], position["position"]
            stream.waiting = deque(_Candidate(*numbers) for numbers in position["waiting"])

    def _made_for(self) -> dict[str, Any]:
        """What a position is only valid for, by recipe key."""
        return {
            "seed": self._seed,
            "data.global_batch_queries": self._options.global_batch_queries,
            "data.drop_last": self._options.drop_last,
            "data.shuffle": self._options.shuffle,
            "data.train": [
                f"{len(stream.source)} examples, {size} per epoch"
                for stream, size in zip(self._streams, self._epoch_sizes, strict=True)
            ],
        }

    def _epoch_order(self) -> npt.NDArray[np.int64]:
        """Source number of each batch of the current epoch."""
        order = np.repeat(np.arange(len(self._batch_counts)), self._batch_counts)
        if self._options.shuffle:
            np.random.default_rng([self._seed, 2, self._epoch]).shuffle(order)
        return order

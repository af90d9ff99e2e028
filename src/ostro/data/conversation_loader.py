"""The training loader of conversations: an endless iterator of optimizer steps whose position is one number.

Rows, tokens and packing are left to `conversation`, `conversation_tokens` and `conversation_collate`. The idea: sample
g of a run is known from the seed and g alone, on any rank. Each source is passed over again and again, each time in a
new order; an epoch takes `weight * rows` samples from each source and mixes them; step s holds the samples from
`s * global_batch_samples` on, also across the end of an epoch. So every step has its full size, no row comes twice in
an epoch unless its weight is above 1, and a position is the number of samples handed out.

One worker thread makes steps in order, one ahead of the step handed out; a few more read the images of its samples,
which is most of the work and leaves Python's lock free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ostro.data.background import BackgroundLoader
from ostro.data.conversation import ConversationSource
from ostro.data.conversation_collate import ConversationBatch, collate
from ostro.data.conversation_options import ConversationDataOptions
from ostro.data.conversation_tokens import ConversationEncoder
from ostro.data.images import ImageTokens
from ostro.errors import DataError, RecipeError
from ostro.models.packed import even_micro_batches, micro_batches

# A step holds all its pixels, which can be large; one is enough to hide the reading.
_PREPARED_STEPS = 1
_NUM_READERS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class ConversationStep:
    """What one rank needs for one optimizer step.

    Attributes:
        micro_batches: Each of at most `micro_batch_tokens` tokens; longest conversations first, or evenly where the
            loader was asked for a number of them.
        num_supervised: Labels of all micro-batches of this rank that are not -100.
        num_tokens: Tokens of all of them.
        num_images: Images of all of them.
        epoch: Epoch of the step's first sample, from 0.
        num_samples: Conversations of the run so far over all ranks, this step included.
    """

    micro_batches: tuple[ConversationBatch, ...]
    num_supervised: int
    num_tokens: int
    num_images: int
    epoch: int
    num_samples: int


class SamplePlan:
    """Which row of which source sample g of a run is.

    Attributes:
        num_samples_per_epoch: Samples of one epoch, over all sources.
    """

    def __init__(self, sources: Sequence[ConversationSource], options: ConversationDataOptions, *, seed: int) -> None:
        """Counts what an epoch takes from each source.

        Args:
            sources: One for each entry of `options.train`, in order.
            options: Weights and order.
            seed: Decides every order, >= 0.
        """
        self._sizes = [len(source) for source in sources]
        pairs = zip(options.train, self._sizes, strict=True)
        self._epoch_sizes = [max(round(entry.weight * size), 1) for entry, size in pairs]
        self._shuffle, self._seed = options.shuffle, seed
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None
        self.num_samples_per_epoch = sum(self._epoch_sizes)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Source and row of sample `number`, from 0."""
        epoch, place = divmod(number, self.num_samples_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        source, row = self._epoch[1][place]
        return int(source), int(row)

    def describe(self) -> list[str]:
        """The sources in words that tell when a position no longer fits them."""
        return [f"{size} rows, {drawn} per epoch" for size, drawn in zip(self._sizes, self._epoch_sizes, strict=True)]

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        """`[samples, 2]` source and row of each sample of an epoch."""
        parts = []
        for source, (size, drawn) in enumerate(zip(self._sizes, self._epoch_sizes, strict=True)):
            first, last = epoch * drawn, (epoch + 1) * drawn
            passes = range(first // size, (last - 1) // size + 1)
            rows = np.concatenate([self._pass_order(source, number) for number in passes])
            rows = rows[first - passes[0] * size : last - passes[0] * size]
            parts.append(np.stack([np.full(drawn, source), rows], axis=1))
        samples: npt.NDArray[np.int64] = np.concatenate(parts)
        if self._shuffle:
            np.random.default_rng([self._seed, 4, epoch]).shuffle(samples)
        return samples

    def _pass_order(self, source: int, number: int) -> npt.NDArray[np.int64]:
        order: npt.NDArray[np.int64] = np.arange(self._sizes[source])
        if self._shuffle:
            np.random.default_rng([self._seed, 3, source, number]).shuffle(order)
        return order


class ConversationLoader(BackgroundLoader[ConversationStep]):
    """Endless steps of one rank, made by a worker thread; a context manager that ends the thread.

    Example:
        with ConversationLoader(open_conversations(options.train), encoder, options, seed=17) as loader:
            for step in itertools.islice(loader, loader.num_steps_per_epoch):
                ...
    """

    def __init__(
        self,
        sources: Sequence[ConversationSource],
        encoder: ConversationEncoder,
        options: ConversationDataOptions,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fit: Callable[[int], int] | None = None,
    ) -> None:
        """Starts at the first step; the thread starts with the first `next`.

        Args:
            sources: One for each entry of `options.train`, in order, as `open_conversations` returns them.
            encoder: Template and tokenizer of the model.
            options: Batch sizes, weights and order.
            seed: Decides every order, >= 0; the same on every rank.
            rank: This rank, from 0.
            world_size: Number of ranks that share each step.
            fit: Of a pipeline: maps a number of micro-batches to the next that it takes. A step has about equal ones,
                of that number where it has as many conversations.

        Raises:
            RecipeError: When there are more ranks than conversations in a step.

        Distributed: no communication. Every rank encodes its own contiguous share of a step; counts are those of the
        share.
        """
        if options.global_batch_samples < world_size:
            raise RecipeError(
                f"data.global_batch_samples: must be at least the number of ranks that share it, {world_size}, "
                f"got {options.global_batch_samples}"
            )
        super().__init__()
        self._sources, self._encoder, self._options, self._seed = sources, encoder, options, seed
        self._plan = SamplePlan(sources, options, seed=seed)
        self._rank, self._world_size, self._fit = rank, world_size, fit
        self._num_samples = 0
        self._next_sample = 0

    @property
    def image_tokens(self) -> ImageTokens:
        """How the model turns images into tokens."""
        return self._encoder.image_tokens

    @property
    def num_samples_per_epoch(self) -> int:
        """Conversations of one epoch, over all sources and ranks."""
        return self._plan.num_samples_per_epoch

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps that hold every conversation of an epoch; the last of them may begin the next epoch."""
        return -(-self._plan.num_samples_per_epoch // self._options.global_batch_samples)

    @property
    def epoch(self) -> int:
        """Epochs completed by the steps handed out so far."""
        return self._num_samples // self._plan.num_samples_per_epoch

    def __next__(self) -> ConversationStep:
        """The next step.

        Raises:
            DataError: When a row or an image of it is wrong; the position stays before it.
        """
        if self._worker is None:
            self._next_sample = self._num_samples
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="conversation-loader")
        self._submit(self._worker, 1)
        step: ConversationStep = self._prepared[0].result()
        self._prepared.popleft()
        self._num_samples = step.num_samples
        self._submit(self._worker, _PREPARED_STEPS)
        return step

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, as plain numbers and text, for any number of ranks."""
        return {"made_for": self._made_for(), "num_samples": self._num_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position; the next step is the one that would have followed it.

        Raises:
            DataError: When it was saved with other sources, another seed or another batch size.
        """
        now = self._made_for()
        for name, then in state["made_for"].items():
            if then != now[name]:
                raise DataError(
                    f"{name}: the saved position was made with {then}, got {now[name]}; resume with what it was"
                )
        self.close()
        self._num_samples = state["num_samples"]

    def _submit(self, worker: ThreadPoolExecutor, count: int) -> None:
        while len(self._prepared) < count:
            self._prepared.append(worker.submit(self._prepare, self._next_sample))
            self._next_sample += self._options.global_batch_samples

    def _prepare(self, first: int) -> ConversationStep:
        count = self._options.global_batch_samples
        share = range(
            first + self._rank * count // self._world_size, first + (self._rank + 1) * count // self._world_size
        )
        conversations = [self._sources[source][row] for source, row in map(self._plan.__getitem__, share)]
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="conversation-reader") as readers:
            encoded = list(readers.map(self._encoder.encode, conversations))
        lengths, budget = [len(item.token_ids) for item in encoded], self._options.micro_batch_tokens
        if self._fit is None:
            groups = micro_batches(lengths, budget)
        else:
            needed = len(even_micro_batches(lengths, budget, 1))
            groups = even_micro_batches(lengths, budget, self._fit(needed))
        batches = tuple(collate([encoded[index] for index in group]) for group in groups)
        return ConversationStep(
            micro_batches=batches,
            num_supervised=sum(batch.num_supervised for batch in batches),
            num_tokens=sum(batch.num_tokens for batch in batches),
            num_images=sum(batch.num_images for batch in batches),
            epoch=first // self._plan.num_samples_per_epoch,
            num_samples=first + count,
        )

    def _made_for(self) -> dict[str, Any]:
        """What a position is only valid for, by recipe key."""
        return {
            "seed": self._seed,
            "data.global_batch_samples": self._options.global_batch_samples,
            "data.shuffle": self._options.shuffle,
            "data.train": self._plan.describe(),
        }

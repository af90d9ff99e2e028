"""The training loader: an endless iterator of tokenized batches whose position can be saved and restored exactly.

What a batch holds is decided by `plan`, and tokenized by `retrieval_collate`. The idea: one worker thread makes the
next few batches in order, each together with the plan's position after it. The loader's position is that of the last
batch handed out, so what was prepared but not handed out is made again after a restart, and nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ostro.data.background import BackgroundLoader
from ostro.data.options import DataOptions
from ostro.data.plan import BatchPlan
from ostro.data.retrieval import RetrievalSource
from ostro.data.retrieval_collate import RetrievalBatch, collate

if TYPE_CHECKING:
    from ostro.models.tokenizer import TextTokenizer

# A tokenized batch is small; a few of them cover a slow read.
_PREPARED_BATCHES = 4


class RetrievalLoader(BackgroundLoader[RetrievalBatch]):
    """Endless batches of one rank, made by a worker thread; a context manager that ends the thread.

    Example:
        with RetrievalLoader(open_sources(options), tokenizer, options, seed=17) as loader:
            for batch in itertools.islice(loader, loader.num_batches_per_epoch):
                ...
    """

    def __init__(
        self,
        sources: Sequence[RetrievalSource],
        tokenizer: TextTokenizer,
        options: DataOptions,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Starts at the first batch; the thread starts with the first `next`.

        Args:
            sources: One for each entry of `options.train`, in order, as `open_sources` returns them.
            tokenizer: Tokenizer of the model.
            options: Batch size, prompts, limits.
            seed: Decides every order and every draw, >= 0; the same on every rank.
            rank: This rank, from 0.
            world_size: Number of ranks that share each global batch.

        Raises:
            RecipeError: When `drop_last` leaves nothing of a source.

        Distributed: no communication. Every rank plans the same global batches and tokenizes its own share.
        """
        super().__init__()
        self._plan = BatchPlan(sources, options, seed=seed)
        self._tokenizer, self._options = tokenizer, options
        self._rank, self._world_size = rank, world_size
        self._state = self._plan.state_dict()

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of one epoch, over all sources; the same in every epoch and on every rank."""
        return self._plan.num_batches_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs completed by the batches handed out so far."""
        return int(self._state["epoch"])

    def __next__(self) -> RetrievalBatch:
        """The next batch.

        Raises:
            DataError: When a row of it is wrong; the position stays before it.
        """
        if self._worker is None:
            self._plan.load_state_dict(self._state)
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="retrieval-loader")
        while len(self._prepared) < _PREPARED_BATCHES:
            self._prepared.append(self._worker.submit(self._prepare))
        batch: RetrievalBatch
        batch, self._state = self._prepared[0].result()
        self._prepared.popleft()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain numbers, text and lists, for any number of ranks."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position; the next batch is the one that would have followed it.

        Raises:
            DataError: When it was saved with other sources, another seed or another batch size.
        """
        self.close()
        self._plan.load_state_dict(state)
        self._state = self._plan.state_dict()

    def _prepare(self) -> tuple[RetrievalBatch, dict[str, Any]]:
        planned = self._plan.next_batch()
        batch = collate(planned, self._tokenizer, self._options, rank=self._rank, world_size=self._world_size)
        return batch, self._plan.state_dict()

"""A search whose texts are shared out over ranks that each hold the whole model: every rank encodes each n-th text, and
all get the vectors of one process.

How rankings are scored is left to `retrieval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ostro.data.evaluation_set import EvaluationSet
from ostro.inference.encoder import Encoder
from ostro.parallel.collectives import all_gather_rows
from ostro.retrieval.evaluate import evaluate
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import RetrievalReport
from ostro.train.ranks import Ranks


class SharedEncoder:
    """An encoder whose texts are dealt out over ranks; every rank gets all vectors."""

    def __init__(self, encoder: Encoder, ranks: Ranks) -> None:
        """Keeps both.

        Args:
            encoder: With the same weights on all ranks.
            ranks: Those that call the methods together, with the same texts.
        """
        self._encoder, self._ranks = encoder, ranks

    def encode_query(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings `[N, D]` of queries, float32 on the CPU, on every rank.

        Distributed: one all-gather.
        """
        return self._share(self._encoder.encode_query, texts)

    def encode_document(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings `[N, D]` of documents, float32 on the CPU, on every rank.

        Distributed: one all-gather.
        """
        return self._share(self._encoder.encode_document, texts)

    def _share(self, encode: Callable[[Sequence[str]], torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
        ranks = self._ranks
        with ranks.agreed():
            own = encode(ranks.share_of(texts))
        counts = [[len(texts[rank :: ranks.world_size])] for rank in range(ranks.world_size)]
        # to the model's device: its backend gathers there
        [gathered] = all_gather_rows([own.to(self._encoder.embedder.device)], counts, ranks.group)
        embeddings = torch.empty(len(texts), own.shape[1])
        for rank, rows in enumerate(gathered.split([count for [count] in counts])):
            embeddings[rank :: ranks.world_size] = rows.cpu()
        return embeddings


def shared_search(
    evaluation: EvaluationSet, options: EvaluateOptions, encoder: Encoder, ranks: Ranks
) -> RetrievalReport:
    """Searches a held-out set with the texts dealt out over ranks.

    Args:
        evaluation: The set.
        options: How it is scored.
        encoder: With the same weights on all ranks.
        ranks: Those that call it together.

    Returns:
        The report of one process, the same on all ranks.

    Raises:
        OstroError: When the set cannot be scored; `ToldElsewhere` on ranks other than 0.

    Distributed: one all-gather for the queries and for each block of documents.
    """
    with ranks.told_once():
        return evaluate(SharedEncoder(encoder, ranks), evaluation, options, seed=0)

"""From planned examples to token ids: the batch a training step receives.

Packing, micro-batches and devices are left to the training loop. Texts stay unpadded lists of token ids, because the
native batch form is packed.

Shapes: B local queries, N local documents, P known positives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ostro.data.options import DataOptions
from ostro.data.plan import PlannedBatch

if TYPE_CHECKING:
    from ostro.models.tokenizer import TextTokenizer


@dataclass(frozen=True)
class RetrievalBatch:
    """One rank's share of a global contrastive batch.

    Attributes:
        token_ids: B queries, then N documents: the B positives in the order of the queries, then drawn negatives.
        num_queries: B; 0 on a rank that gets no query of a last batch with fewer queries than ranks.
        positives: `[B]` int64, row of each query's positive among the N documents.
        document_ids: `[N]` int64 >= 0, equal for the same document on every rank; no two equal in the global batch.
        known_positive_ids: `[B, P]` int64, ids of the documents of the global batch known to answer the query, its own
            positive included; padded with -1. P is the same on every rank.
        source: Name of the source the batch comes from.
        epoch: Epoch it belongs to, from 0.
        num_samples: Queries of the run so far over all ranks, this batch included.
    """

    token_ids: tuple[list[int], ...]
    num_queries: int
    positives: torch.Tensor
    document_ids: torch.Tensor
    known_positive_ids: torch.Tensor
    source: str
    epoch: int
    num_samples: int


def collate(
    batch: PlannedBatch, tokenizer: TextTokenizer, options: DataOptions, *, rank: int = 0, world_size: int = 1
) -> RetrievalBatch:
    """Reads and tokenizes one rank's share of a planned batch.

    Args:
        batch: The global batch.
        tokenizer: Adds special tokens and cuts to the limits.
        options: Prompts and token limits.
        rank: This rank, from 0.
        world_size: Number of ranks; shares are contiguous and differ by at most one query.

    Returns:
        The share of `rank`.

    Raises:
        DataError: When the text of a drawn document is wrong.
    """
    count = len(batch.examples)
    share = batch.examples[rank * count // world_size : (rank + 1) * count // world_size]
    documents = [(item, 0) for item in share]
    documents += [(item, place) for item in share for place in range(1, len(item.document_ids))]
    queries = [options.prompts.query + item.example.query for item in share]
    texts = [options.prompts.document + item.example.documents[item.document_ids[place]] for item, place in documents]
    width = max(len(item.known_positive_keys) for item in batch.examples)
    known = [(*item.known_positive_keys, *[-1] * (width - len(item.known_positive_keys))) for item in share]
    return RetrievalBatch(
        token_ids=(
            *tokenizer.encode(queries, options.query_max_tokens),
            *tokenizer.encode(texts, options.document_max_tokens),
        ),
        num_queries=len(share),
        positives=torch.arange(len(share)),
        document_ids=torch.tensor([item.document_keys[place] for item, place in documents], dtype=torch.int64),
        known_positive_ids=torch.tensor(known, dtype=torch.int64).view(len(share), width),
        source=batch.source,
        epoch=batch.epoch,
        num_samples=batch.num_samples,
    )

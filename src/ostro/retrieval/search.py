"""Exact search: the k best documents of every query by inner product, in memory that does not grow with the corpus.

Encoding is left to the encoder, judging to `evaluate`. The idea: a candidate is one 64-bit key, its float32 score in
the high half and, in the low half, its place in a random order of the documents drawn for this query. Sorting keys
therefore sorts by score and breaks ties at random, so that a collapsed model, whose scores are all equal, finds what
chance finds. With ties going to the first document it would look perfect on a set whose relevant documents come first.

Letters: Q queries (M in a chunk), N documents of a chunk, D dims, K documents kept per query, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ostro.errors import OstroError

# A chunk of scores is 8 MiB: a large enough matmul, and it is still in the cache when it is compared.
_CHUNK_QUERIES = 512
_CHUNK_DOCUMENTS = 4096
# Matmul kernels add up the last few rows and columns in another order, so that the scores of equal vectors would differ
# in the last bit by position alone. Chunks filled up to whole tiles have no such rows; 16 is enough on x86.
_TILE = 64

_EMPTY = torch.iinfo(torch.int64).min
_LOW_HALF = 0xFFFFFFFF
# 32-bit mixing constants: C. Wellons, "lowbias32" (hash-prospector, 2018).
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B
_UNMIX_1, _UNMIX_2 = pow(_MIX_1, -1, 1 << 32), pow(_MIX_2, -1, 1 << 32)


@dataclass(frozen=True)
class TopK:
    """The best documents of each query, best first.

    Attributes:
        scores: `[Q, K]` float32.
        indices: `[Q, K]` int64, positions in the corpus.
    """

    scores: Tensor
    indices: Tensor


class Ranking:
    """The k best documents of each query among those shown so far."""

    def __init__(self, num_queries: int, k: int, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        """Starts with no documents.

        Args:
            num_queries: Q.
            k: Documents to keep per query, >= 1.
            seed: Decides the order of documents with equal scores.
            device: Where scores will come from.

        Raises:
            ValueError: When `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k: must be >= 1, got {k}")
        self._k = k
        self._num_documents = 0
        self._keys_QK = torch.full((num_queries, k), _EMPTY, device=device)
        self._salts_Q = _mix(torch.arange(num_queries, device=device) ^ int(_mix(torch.tensor(seed & _LOW_HALF))))

    def add(self, scores_MN: Tensor, *, first_query: int, first_document: int) -> None:
        """Shows M queries the next N documents.

        Args:
            scores_MN: `[M, N]` float32 without nan, N >= 1.
            first_query: Query of row 0.
            first_document: Position in the corpus of column 0, below 2^32 - N.
        """
        queries = slice(first_query, first_query + len(scores_MN))
        best_MK = self._keys_QK[queries]
        if best_MK[0, -1] == _EMPTY:
            # Not yet k documents: what is not among the k best of this chunk cannot be among the k best of all.
            floor_M1 = scores_MN.topk(min(self._k, scores_MN.shape[1])).values[:, -1:]
        else:
            floor_M1 = _scores(best_MK[:, -1:])
        rows_C, columns_C = (scores_MN >= floor_M1).nonzero(as_tuple=True)
        ties_C = _mix((columns_C + first_document) ^ self._salts_Q[queries][rows_C])
        keys_C = _keys(scores_MN[rows_C, columns_C], ties_C)
        kept = keys_C > best_MK[rows_C, -1]
        rows_C, keys_C = rows_C[kept], keys_C[kept]

        counts_M = rows_C.bincount(minlength=len(best_MK))
        places_C = torch.arange(len(rows_C), device=rows_C.device) - (counts_M.cumsum(0) - counts_M)[rows_C]
        pool = best_MK.new_full((len(best_MK), self._k + int(counts_M.max())), _EMPTY)
        pool[:, : self._k] = best_MK
        pool[rows_C, self._k + places_C] = keys_C
        self._keys_QK[queries] = pool.topk(self._k).values
        self._num_documents = max(self._num_documents, first_document + scores_MN.shape[1])

    def result(self) -> TopK:
        """The best documents so far; fewer than k when fewer were shown."""
        keys = self._keys_QK[:, : self._num_documents]
        return TopK(_scores(keys), _unmix(keys & _LOW_HALF) ^ self._salts_Q[:, None])


def top_k(query_embeddings: Tensor, document_blocks: Iterable[Tensor], k: int, *, seed: int = 0) -> TopK:
    """Finds the k documents with the largest inner product, as `(query_embeddings @ documents.T).topk(k)` would.

    Documents with equal scores come in an order that is random, but fixed by `seed`, and another one for each query.
    The result does not depend on how the documents are cut into blocks.

    Args:
        query_embeddings: `[Q, D]`. Scores are float32, computed on its device.
        document_blocks: `[n, D]` each, in corpus order, of any sizes; moved to the queries' device one at a time.
        k: Documents per query, >= 1.
        seed: Decides the order of equal scores.

    Returns:
        `[Q, min(k, documents)]` scores and positions.

    Raises:
        OstroError: When an embedding is not finite, or so large that its square is not; names the row.
        ValueError: When `k` is below 1, or queries and documents differ in D.
    """
    num_queries, num_dims = query_embeddings.shape
    queries = _tiled(_finite(query_embeddings, "query_embeddings", 0))
    ranking = Ranking(num_queries, k, seed=seed, device=queries.device)
    first_document = 0
    for block in _chunks(document_blocks, _CHUNK_DOCUMENTS):
        if block.shape[1] != num_dims:
            raise ValueError(f"document_blocks: {block.shape[1]} dims, but the queries have {num_dims}")
        documents = _tiled(_finite(block.to(queries.device), "document_blocks", first_document))
        for first_query in range(0, num_queries, _CHUNK_QUERIES):
            scores = queries[first_query : first_query + _CHUNK_QUERIES] @ documents.T
            scores = scores[: num_queries - first_query, : len(block)]
            ranking.add(scores, first_query=first_query, first_document=first_document)
        first_document += len(block)
    return ranking.result()


def _chunks(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in chunks of `size`, so that each matmul, and each rounding in it, is that of any other cutting."""
    rest: Tensor | None = None
    for block in blocks:
        rows = block if rest is None else torch.cat([rest, block])
        whole = len(rows) // size * size
        for start in range(0, whole, size):
            yield rows[start : start + size]
        rest = rows[whole:]
    if rest is not None and len(rest):
        yield rest


def _finite(embeddings: Tensor, name: str, first_row: int) -> Tensor:
    """The embeddings in float32; finite squared norms keep every inner product finite too."""
    embeddings = embeddings.float()
    bad = (~embeddings.square().sum(-1).isfinite()).nonzero()
    if len(bad):
        raise OstroError(
            f"{name}: row {first_row + int(bad[0])} is not finite; check the weights, or encode in a wider dtype"
        )
    return embeddings


def _tiled(embeddings: Tensor) -> Tensor:
    """The rows, with rows of zeros after them up to a whole number of tiles."""
    return torch.nn.functional.pad(embeddings, (0, 0, 0, -len(embeddings) % _TILE))


def _keys(scores: Tensor, ties: Tensor) -> Tensor:
    """int64 keys that sort by float32 score, then by tie, an integer below 2^32."""
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 makes -0.0 and 0.0 the same bits
    return (_sortable(bits).long() << 32) | ties


def _scores(keys: Tensor) -> Tensor:
    return _sortable((keys >> 32).int()).view(torch.float32)


def _sortable(bits: Tensor) -> Tensor:
    """float32 bits to integers in the order of the floats, and back: negative floats count downward."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _mix(values: Tensor) -> Tensor:
    """A fixed, random-looking permutation of the integers below 2^32; int64 products wrap and keep their low half."""
    values = values ^ (values >> 16)
    values = values * _MIX_1 & _LOW_HALF
    values = values ^ (values >> 15)
    values = values * _MIX_2 & _LOW_HALF
    return values ^ (values >> 16)


def _unmix(values: Tensor) -> Tensor:
    """The inverse of `_mix`."""
    values = values ^ (values >> 16)
    values = values * _UNMIX_2 & _LOW_HALF
    values = values ^ (values >> 15) ^ (values >> 30)
    values = values * _UNMIX_1 & _LOW_HALF
    return values ^ (values >> 16)

"""The contrastive loss (InfoNCE) over the documents of all ranks, and the masks that keep answers out of its negatives.

This file leaves encoding to the model, the choice of negatives to the data, and the order of forward and backward
passes to the loop or to `cached`.

The idea: each query has to find its positive among all documents of the global batch, so that every document read for
one query serves all the others as a negative. This holds only for documents that are no answer to the query. Three
kinds of rows are therefore left out of its softmax: copies of its positive and other documents known to answer it;
second copies of a document, which would weigh a negative by how often it was drawn; and, with a margin, documents that
score so much above the positive that they probably answer it too.

Shapes: B local queries, N local documents before the gather and global ones after it, Q global queries, D embedding
size, P known positives per query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ostro.losses.options import ContrastiveOptions
from ostro.parallel.collectives import all_gather_rows, gather_counts


@dataclass(frozen=True)
class ContrastiveTargets:
    """Which document answers which query, on the device of the embeddings.

    Attributes:
        positives: `[B]` int64, row of each query's positive among the rank's N documents. Queries may share a row.
        document_ids: `[N]` int64, >= 0; equal ids mean the same document, on any rank.
        known_positive_ids: `[B, P]` int64 padded with -1, ids of all documents known to answer each query. P may differ
            between ranks.
    """

    positives: torch.Tensor
    document_ids: torch.Tensor
    known_positive_ids: torch.Tensor


@dataclass(frozen=True)
class ContrastiveOutput:
    """The loss and what a log wants to know about it; each field, summed over ranks, is that of the global batch.

    Attributes:
        loss: 0-d, with gradient: sum over the local queries divided by the global number of queries.
        accuracy: 0-d, share of queries whose positive has the highest score. A positive tied with t others counts
            1 / (t + 1), so that embeddings which are all equal score at chance.
        positive_score: 0-d, mean cosine of query and positive.
        num_masked: 0-d int64, number of (query, document) pairs left out.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    positive_score: torch.Tensor
    num_masked: torch.Tensor


class LearnedTemperature(torch.nn.Module):
    """A temperature trained with the model: the exponential of a scalar parameter, so that it stays above 0.

    It lives beside the model, not in it: keep it out of weight decay, and sum its gradient over ranks.
    Source: CLIP (Radford et al., 2021), section 2.3, which learns the logarithm of the inverse.
    """

    def __init__(self, initial: float) -> None:
        """Starts at `initial`, > 0."""
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> torch.Tensor:
        """The temperature, a 0-d float32 tensor with gradient."""
        return self.log_temperature.exp()


def contrastive_loss(
    query_BD: torch.Tensor,
    document_ND: torch.Tensor,
    targets: ContrastiveTargets,
    *,
    temperature: torch.Tensor | float,
    options: ContrastiveOptions,
    group: dist.ProcessGroup | None = None,
) -> ContrastiveOutput:
    """InfoNCE with the documents of all ranks as negatives.

    With s the cosine, p(q) the positive row of query q and t the temperature:

        loss    = 1/Q * sum over q of -log(exp(s(q, p(q)) / t) / sum over n in C(q) of exp(s(q, n) / t))
        C(q)    = {p(q)} and every row n that is the first of its document, whose document is not known to answer q,
                  and with s(q, n) <= s(q, p(q)) + false_negative_margin

    Symmetric: the mean of this and of the loss that finds q from p(q) among all Q queries, where another q' is left out
    if p(q) is known to answer q' or s(q', p(q)) > s(q, p(q)) + false_negative_margin.

    Matryoshka: the weighted sum of this loss for the full size and for each listed number of leading dims,
    re-normalised. The margin is judged once, on the full size and without gradient.

    Scores are float32 (float64 for float64 embeddings), also under autocast.

    Args:
        query_BD: `[B, D]` L2-normalised query embeddings of this rank.
        document_ND: `[N, D]` L2-normalised document embeddings of this rank.
        targets: Positives and ids of this rank.
        temperature: > 0; a 0-d tensor if it is learned.
        options: Symmetric, Matryoshka and margin settings; its temperature is not read.
        group: Ranks whose queries and documents form the global batch; None for one process.

    Returns:
        The loss and its statistics.

    Raises:
        ValueError: When embeddings and targets disagree in shape, or a Matryoshka dim exceeds D.

    Distributed: three all-gathers (counts, ids, embeddings) and one reduce-scatter in backward. B, N and P may differ
        between ranks and B may be 0. Gradients have to be summed over ranks, not averaged, to equal those of one
        process on the whole batch.

    Source: van den Oord et al. 2018, eq. 4; Kusupati et al. 2022, eq. 1; Qwen3-Embedding (Zhang et al. 2025), eq. 1
        (margin).
    """
    _check_shapes(query_BD, document_ND, targets, options)
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    # No autocast: bf16 scores have steps of 0.004 near 1, which a temperature of 0.02 turns into 0.2 in the logits.
    with torch.autocast(query_BD.device.type, enabled=False):
        searches, num_queries = _global_searches(
            query_BD.to(dtype), document_ND.to(dtype), targets, symmetric=options.symmetric, group=group
        )
        outputs = [_search_loss(search, temperature, options) for search in searches]
    return ContrastiveOutput(
        loss=torch.stack([output.loss for output in outputs]).mean() / num_queries,
        accuracy=outputs[0].accuracy / num_queries,
        positive_score=outputs[0].positive_score / num_queries,
        num_masked=outputs[0].num_masked,
    )


@dataclass(frozen=True)
class _Search:
    """One direction: each of B local anchors has to find its target row among the M global candidates not excluded."""

    anchor_BD: torch.Tensor
    candidate_MD: torch.Tensor
    target: torch.Tensor
    excluded_BM: torch.Tensor


def _check_shapes(
    query_BD: torch.Tensor, document_ND: torch.Tensor, targets: ContrastiveTargets, options: ContrastiveOptions
) -> None:
    rows = {
        "positives": (targets.positives, query_BD),
        "document_ids": (targets.document_ids, document_ND),
        "known_positive_ids": (targets.known_positive_ids, query_BD),
    }
    for name, (ids, embeddings) in rows.items():
        if len(ids) != len(embeddings):
            raise ValueError(f"targets.{name}: must have one row per embedding, {len(embeddings)}, got {len(ids)}")
    dim = query_BD.shape[1]
    if document_ND.shape[1] != dim:
        raise ValueError(f"document_ND: must have the embedding size of the queries, {dim}, got {document_ND.shape[1]}")
    if max(options.matryoshka_dims, default=0) > dim:
        raise ValueError(
            f"loss.matryoshka_dims: must be <= the embedding size {dim}, got {list(options.matryoshka_dims)}"
        )


def _global_searches(
    query_BD: torch.Tensor,
    document_ND: torch.Tensor,
    targets: ContrastiveTargets,
    *,
    symmetric: bool,
    group: dist.ProcessGroup | None,
) -> tuple[list[_Search], int]:
    """Gathers the global batch: query to document, and document to query if `symmetric`; with Q as second value."""
    known = torch.cat((targets.document_ids[targets.positives, None], targets.known_positive_ids), dim=1)
    counts = gather_counts((len(query_BD), len(document_ND), known.shape[1]), group, query_BD.device)
    width = max(width for _, _, width in counts)
    known = F.pad(known, (0, width - known.shape[1]), value=-1)
    document_ids, known = all_gather_rows(
        (targets.document_ids, known.flatten()),
        [(documents, queries * width) for queries, documents, _ in counts],
        group,
    )
    known_QP = known.view(-1, width)
    # Queries of other ranks are needed as candidates only, by the documents of the symmetric loss.
    parts = (document_ND, query_BD) if symmetric else (document_ND,)
    document_ND, *query_QD = all_gather_rows(
        parts, [(documents, queries)[: len(parts)] for queries, documents, _ in counts], group
    )
    earlier = counts[: 0 if group is None else group.rank()]
    row = torch.arange(len(query_BD), device=query_BD.device)
    position = row + sum(queries for queries, _, _ in earlier)
    positives = targets.positives + sum(documents for _, documents, _ in earlier)

    excluded_BN = _is_known(known_QP[position], document_ids) | _is_second_copy(document_ids)
    excluded_BN[row, positives] = False
    searches = [_Search(query_BD, document_ND, positives, excluded_BN)]
    if symmetric:
        excluded_BQ = _is_known(known_QP, document_ids[positives]).T
        excluded_BQ[row, position] = False
        searches.append(_Search(document_ND[positives], query_QD[0], position, excluded_BQ))
    return searches, len(known_QP)


def _is_known(known_positive_ids: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """`[B, N]` bool, whether document n is among the known positives of query b, without a `[B, N, P]` comparison.

    Args:
        known_positive_ids: `[B, P]` int64, -1 where there is none.
        document_ids: `[N]` int64, >= 0.
    """
    distinct_ids, which = document_ids.unique(return_inverse=True)
    place = torch.searchsorted(distinct_ids, known_positive_ids)
    # Ids that are not in the batch all go to one more column, which no document looks up.
    place = place.where(torch.isin(known_positive_ids, distinct_ids), len(distinct_ids))
    known = torch.zeros(len(place), len(distinct_ids) + 1, dtype=torch.bool, device=place.device)
    return known.scatter_(1, place, True)[:, which]


def _is_second_copy(document_ids: torch.Tensor) -> torch.Tensor:
    """`[N]` bool, whether the same document stands in an earlier row."""
    distinct_ids, which = document_ids.unique(return_inverse=True)
    row = torch.arange(len(document_ids), device=document_ids.device)
    first_row = torch.full_like(distinct_ids, len(document_ids)).scatter_reduce_(0, which, row, "amin")
    return first_row[which] != row


def _search_loss(search: _Search, temperature: torch.Tensor | float, options: ContrastiveOptions) -> ContrastiveOutput:
    """Loss over the full size and every Matryoshka dim, and statistics of the full size, as sums over the anchors."""
    dim, target_B1 = search.anchor_BD.shape[1], search.target[:, None]
    matryoshka_weights = options.matryoshka_weights or (1.0,) * len(options.matryoshka_dims)
    weights = {dim: 1.0, **dict(zip(options.matryoshka_dims, matryoshka_weights, strict=True))}

    # The temperature divides the anchors, not the scores: a learned one then keeps no second [B, M] for its gradient.
    logits_BM = (search.anchor_BD / temperature) @ search.candidate_MD.T
    excluded_BM, positive_B1 = search.excluded_BM, logits_BM.detach().gather(1, target_B1)
    if options.false_negative_margin is not None:
        excluded_BM = excluded_BM | (logits_BM > positive_B1 + options.false_negative_margin / temperature)
    logits_BM = logits_BM.masked_fill_(excluded_BM, -math.inf)
    loss = weights.pop(dim) * F.cross_entropy(logits_BM, search.target, reduction="sum")
    for size, weight in weights.items():
        anchor_BD, candidate_MD = (F.normalize(rows[:, :size]) for rows in (search.anchor_BD, search.candidate_MD))
        sliced_BM = ((anchor_BD / temperature) @ candidate_MD.T).masked_fill_(excluded_BM, -math.inf)
        loss = loss + weight * F.cross_entropy(sliced_BM, search.target, reduction="sum")

    is_highest = (logits_BM > positive_B1).sum(1) == 0
    return ContrastiveOutput(
        loss=loss,
        accuracy=(is_highest / (logits_BM == positive_B1).sum(1)).sum(),
        positive_score=(search.anchor_BD * search.candidate_MD[search.target]).sum().detach(),
        num_masked=excluded_BM.sum(),
    )

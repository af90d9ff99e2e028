"""The contrastive loss written out pair by pair, in the words of its docstring; and batches to try it on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ostro.losses.contrastive import ContrastiveTargets
from ostro.losses.options import ContrastiveOptions


@dataclass(frozen=True)
class Part:
    """The queries and documents of one rank."""

    query: torch.Tensor
    document: torch.Tensor
    targets: ContrastiveTargets


def make_part(num_queries: int, num_documents: int, *, seed: int, num_known: int = 3, dim: int = 12) -> Part:
    """Random unit vectors; few distinct documents, so that copies and known positives do occur, and shared rows."""
    generator = torch.Generator().manual_seed(seed)
    document_ids = torch.randint(0, 40, (num_documents,), generator=generator)
    known = torch.randint(-1, 40, (num_queries, num_known), generator=generator)
    vectors = torch.randn(num_queries + num_documents, dim, generator=generator, dtype=torch.float64)
    query, document = F.normalize(vectors).split([num_queries, num_documents])
    positives = torch.randint(0, max(num_documents, 1), (num_queries,), generator=generator)
    return Part(query, document, ContrastiveTargets(positives, document_ids, known))


def join(parts: list[Part]) -> Part:
    """The batch that one process would see."""
    known = [part.targets.known_positive_ids for part in parts]
    width = max(rows.shape[1] for rows in known)
    shifts = [sum(len(part.document) for part in parts[:rank]) for rank in range(len(parts))]
    return Part(
        query=torch.cat([part.query for part in parts]),
        document=torch.cat([part.document for part in parts]),
        targets=ContrastiveTargets(
            torch.cat([part.targets.positives + shift for part, shift in zip(parts, shifts, strict=True)]),
            torch.cat([part.targets.document_ids for part in parts]),
            torch.cat([F.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in known]),
        ),
    )


def naive_loss(
    query: torch.Tensor,
    document: torch.Tensor,
    targets: ContrastiveTargets,
    temperature: torch.Tensor | float,
    options: ContrastiveOptions,
) -> torch.Tensor:
    """`contrastive_loss` of one process, by loops over queries and candidates."""
    positive, ids = targets.positives.tolist(), targets.document_ids.tolist()
    known = [{*row, ids[positive[q]]} for q, row in enumerate(targets.known_positive_ids.tolist())]
    score = (query @ document.T).tolist()
    margin = float("inf") if options.false_negative_margin is None else options.false_negative_margin
    queries, documents = range(len(query)), range(len(document))

    def competes(q: int, n: int) -> bool:
        limit = score[q][positive[q]] + margin
        return n == positive[q] or (ids.index(ids[n]) == n and ids[n] not in known[q] and score[q][n] <= limit)

    def competes_back(q: int, other: int) -> bool:
        n = positive[q]
        return other == q or (ids[n] not in known[other] and score[other][n] <= score[q][n] + margin)

    weights = {query.shape[1]: 1.0}
    weights.update(dict.fromkeys(options.matryoshka_dims, 1.0))
    weights.update(dict(zip(options.matryoshka_dims, options.matryoshka_weights, strict=False)))
    total = torch.zeros((), dtype=query.dtype)
    for size, weight in weights.items():
        rows = (query, document) if size == query.shape[1] else (F.normalize(x[:, :size]) for x in (query, document))
        logits = torch.einsum("qd,nd->qn", *rows) / temperature
        for q in queries:
            right = logits[q, positive[q]]
            one_way = logits[q, [n for n in documents if competes(q, n)]].logsumexp(0) - right
            back = logits[[other for other in queries if competes_back(q, other)], positive[q]].logsumexp(0) - right
            total = total + weight * ((one_way + back) / 2 if options.symmetric else one_way)
    return total / len(query)

"""A search whose texts are shared out over ranks: every rank encodes each n-th text, and all get the vectors of one
process.

How rankings are scored is left to `retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ostro.data.evaluation_set import EvaluationSet
from ostro.inference.encoder import Encoder
from ostro.parallel.collectives import all_gather_rows
from ostro.retrieval.evaluate import evaluate
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import RetrievalReport
from ostro.train.judges import Judges


class SharedEncoder(Encoder):
    """An encoder whose texts are dealt out over ranks, which call its methods together with the same texts; every rank
    gets all vectors."""

    def __init__(self, encoder: Encoder, judges: Judges) -> None:
        """Takes over all of an encoder.

        Args:
            encoder: With the same weights on all ranks, or this rank's part of them.
            judges: The ranks.
        """
        super().__init__(
            encoder.embedder,
            encoder.tokenizer,
            prompts=encoder.prompts,
            max_tokens=encoder.max_tokens,
            num_dims=encoder.num_dims,
            micro_batch_tokens=encoder.micro_batch_tokens,
        )
        self._judges = judges

    def encode(self, texts: Sequence[str] | str, *, prompt: str = "") -> torch.Tensor:
        """As `Encoder.encode`.

        Distributed: one all-gather; and for a split model the collectives of `passes` and of the model.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt=prompt)[0]
        ranks = self._judges.data
        most = -(-len(texts) // ranks.world_size)
        # all ranks get as many, so that they tokenise equally often
        own = [*ranks.share_of(texts), *texts[:1]][:most]
        encoded = super().encode(own, prompt=prompt)
        counts = [[len(texts[rank :: ranks.world_size])] for rank in range(ranks.world_size)]
        # to the model's device: its backend gathers there
        [gathered] = all_gather_rows([encoded[: counts[ranks.rank][0]].to(self.embedder.device)], counts, ranks.group)
        embeddings = torch.empty(len(texts), encoded.shape[1])
        for rank, rows in enumerate(gathered.split([count for [count] in counts])):
            embeddings[rank :: ranks.world_size] = rows.cpu()
        return embeddings

    def passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """As `Encoder.passes`; ranks that gather each other's weights have equally many.

        Distributed: one all-reduce of an int64 over these ranks.
        """
        groups = super().passes(lengths)
        return [*groups, *[[]] * (self._judges.in_step.maximum(len(groups)) - len(groups))]


def shared_search(
    evaluation: EvaluationSet, options: EvaluateOptions, encoder: Encoder, judges: Judges
) -> RetrievalReport:
    """Searches a held-out set with the texts dealt out over ranks.

    Args:
        evaluation: The set.
        options: How it is scored.
        encoder: With the same weights on all ranks, or this rank's part of them.
        judges: The ranks, which call it together.

    Returns:
        The report of one process, the same on all ranks.

    Raises:
        OstroError: When the set cannot be scored; `ToldElsewhere` on ranks other than 0.

    Distributed: one all-gather for the queries and for each block of documents.
    """
    with judges.ranks.told_once():
        return evaluate(SharedEncoder(encoder, judges), evaluation, options, seed=0)

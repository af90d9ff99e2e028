"""The cached two-pass form: a contrastive batch of any size in the memory of one micro-batch.

This file leaves the loss to its caller (`contrastive.contrastive_loss` in training) and the cut into micro-batches to
the batch builder.

The idea: a contrastive loss needs all embeddings of the batch at once, and plain backward would keep the graph of the
encoder for all of them. But the chain rule meets in the embeddings, which are small. So the batch is encoded twice:

1. without a graph, one micro-batch at a time, keeping only the embeddings E and the random state before each
   micro-batch; then loss(E) and its backward give dloss/dE;
2. with a graph, one micro-batch at a time: its backward starts from its rows of dloss/dE, and the graph is freed before
   the next one.

The second pass must be the same function as the first. A model in training mode draws dropout masks, so each
micro-batch is re-encoded under the random state it had in the first pass; otherwise dloss/dE belongs to other
embeddings than those it is sent through.

Source: Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(GradCache).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ostro.losses.contrastive import ContrastiveOutput

Texts = TypeVar("Texts")


def cached_backward(
    encode: Callable[[Texts], torch.Tensor],
    micro_batches: Sequence[Texts],
    rows: Sequence[Sequence[int]],
    loss_fn: Callable[[torch.Tensor], ContrastiveOutput],
    *,
    replay: Callable[[Sequence[torch.Tensor]], None] | None = None,
) -> ContrastiveOutput:
    """Adds the gradient of a loss over all embeddings to the parameters, one micro-batch at a time.

    Equal, gradients and random state included, to:

        embeddings = torch.cat([encode(texts) for texts in micro_batches])
        output = loss_fn(embeddings put in the order of rows)
        output.loss.backward()

    One micro-batch is run exactly so, without a second encoding. Peak memory is the graph of the largest micro-batch,
    the embeddings and their gradient, and what `loss_fn` keeps. The random state afterwards is that of one encoding of
    the micro-batches: the last replay ends where the first pass ended.

    Args:
        encode: Texts to embeddings `[n, D]`; enters autocast itself where it is wanted.
        micro_batches: Texts of each micro-batch, at least one micro-batch.
        rows: For each micro-batch, the row of each of its texts among all embeddings; together a permutation of
            `range(N)`.
        loss_fn: All embeddings `[N, D]`, rows in the caller's order, to the output whose `loss` is differentiated.
            Parameters of its own, such as a learned temperature, receive their gradient here. Called once.
        replay: In place of the second pass: adds the gradient to the parameters from that of the embeddings of each
            micro-batch, `[n, D]`. `encode` then needs no gradient.

    Returns:
        The output of `loss_fn`, detached.

    Raises:
        ValueError: When there is no micro-batch, or `rows` is not a permutation.

    Distributed: no collectives of its own; those of `loss_fn` run once. The number of micro-batches may differ between
        ranks unless `encode` has collectives.
    """
    order = [row for group in rows for row in group]
    if not order or sorted(order) != list(range(len(order))):
        raise ValueError(f"rows: must hold each of 0 .. {len(order) - 1} once and not be empty, got {order[:20]}")
    if len(micro_batches) == 1 and replay is None:
        output = loss_fn(_in_order(encode(micro_batches[0]), order))
        output.loss.backward()
        return dataclasses.replace(output, loss=output.loss.detach())

    states: list[list[torch.Tensor]] = []
    pieces: list[torch.Tensor] = []
    with torch.no_grad():
        for texts in micro_batches:
            states.append(_random_state())
            pieces.append(encode(texts))
    embeddings = _in_order(torch.cat(pieces), order).requires_grad_()
    output = loss_fn(embeddings)
    output.loss.backward()
    assert embeddings.grad is not None
    gradients = embeddings.grad[order].split([len(group) for group in rows])

    if replay is not None:
        replay(gradients)
    else:
        for texts, gradient, state in zip(micro_batches, gradients, states, strict=True):
            _set_random_state(state)
            encode(texts).backward(gradient)
    return dataclasses.replace(output, loss=output.loss.detach())


def _in_order(embeddings: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Row i of `embeddings` moved to row `order[i]`."""
    return embeddings[torch.tensor(order).argsort()]


def _random_state() -> list[torch.Tensor]:
    """State of the CPU generator and, once CUDA is in use, of the current device's."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else state


def _set_random_state(state: Sequence[torch.Tensor]) -> None:
    """Restores what `_random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])

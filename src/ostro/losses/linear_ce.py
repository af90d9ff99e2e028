"""Cross-entropy straight from the final hidden states and the head, without the logits of the whole batch.

This file leaves the products to `tiled_head`, the shift of the labels to the data, and the count of supervised tokens
over all ranks to the loop.

The idea: `cross_entropy(hidden_states @ weight.T, labels)` holds `[T, V]` logits several times over, in practice the
largest tensors of a training step, although all that leaves it is one number and two gradients of the size of its
inputs. The gradient of a row's loss needs no other row, so

1. rows without a label are dropped first: no product is spent on them;
2. a chunk of rows gets its logits, its loss and at once its gradients, and the next chunk reuses its memory;
3. within a chunk the head is walked in tiles of vocabulary. The first walk leaves exp(logit - tile maximum) where the
   logit was and keeps maximum and sum of each tile; the second turns it into a probability with one factor per row
   and tile, so that no exponential is taken twice.

What is rounded: nothing but the inputs, the probabilities on their way into the gradient products and the finished
gradients. Logits, softmax, loss and sums are float32 even where inputs are bfloat16, because a bfloat16 logit near 10
has steps of 0.06, which is 6 % of a probability.

Shapes: T rows, R rows with a label in one chunk, H hidden size, V vocabulary (this rank's rows of a sharded head), K
vocabulary rows in one tile.

Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", for the loss without logits; Hsu et
al. 2024, "Liger Kernel", section 3.2, for gradients made in the forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ostro.losses.tiled_head import TiledHead, bfloat16_products
from ostro.parallel.collectives import gather_counts

CHUNK_ROWS = 512
"""Rows whose logits are held at once, from benchmarks/linear_ce.py."""


class HasHiddenStates(Protocol):
    """A model output that can carry hidden states."""

    hidden_states: Any


class FusedLinearCrossEntropy(torch.nn.Module):
    """`fused_linear_cross_entropy` with its settings, as a module a training loop can hold."""

    def __init__(
        self, *, ignore_index: int = -100, chunk_rows: int = CHUNK_ROWS, vocab_group: dist.ProcessGroup | None = None
    ) -> None:
        """Keeps the settings.

        Args:
            ignore_index: Label of rows without a loss.
            chunk_rows: Rows whose logits are held at once, >= 1.
            vocab_group: Ranks over which the rows of the head are spread; None for a whole head.
        """
        super().__init__()
        self.ignore_index, self.chunk_rows, self.vocab_group = ignore_index, chunk_rows, vocab_group

    def forward(
        self,
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor,
        labels: torch.Tensor,
        num_label_tokens: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss; arguments, errors and collectives are those of `fused_linear_cross_entropy`.

        Args:
            hidden_states: `[..., H]` final hidden states.
            lm_head_weight: `[V, H]` rows of the head.
            labels: `[...]` int64, the target of each row.
            num_label_tokens: Divisor of the sum: the number of labels over all ranks and micro-batches of the step;
                None for the labels given here.

        Returns:
            0-d float32.
        """
        return fused_linear_cross_entropy(
            hidden_states,
            lm_head_weight,
            labels,
            num_tokens=num_label_tokens,
            ignore_index=self.ignore_index,
            chunk_rows=self.chunk_rows,
            vocab_group=self.vocab_group,
        )


def get_final_hidden_states(output: HasHiddenStates) -> torch.Tensor:
    """The hidden states that the head reads, out of a model's output.

    Args:
        output: Its `hidden_states` are the final `[B, S, H]` tensor itself, or transformers' tuple with one `[B, S, H]`
            per layer, the final one last.

    Returns:
        `[B, S, H]`.

    Raises:
        ValueError: When the output carries neither.
    """
    try:
        states = output.hidden_states
    except AttributeError as error:
        raise ValueError(f"hidden_states: {type(output).__name__} has none; pass the output of a model") from error
    if isinstance(states, tuple | list) and states:
        states = states[-1]
    if not isinstance(states, torch.Tensor):
        raise ValueError(
            f"hidden_states: must be a tensor or a tuple of tensors, one per layer, got {type(states).__name__}; "
            "call the model with output_hidden_states=True"
        )
    return states


def fused_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_tokens: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int = CHUNK_ROWS,
    vocab_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of all rows with a label, divided by `num_tokens`.

    Equal, up to rounding, to:

        logits = F.linear(hidden_states, weight).float()
        F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / num_tokens

    Without any label it is 0, and the gradients are 0. Gradients are made in the forward pass, so only those that are
    asked for are: none under `torch.no_grad`, none of a frozen head. That of the head is summed in float32 `[V, H]`
    and rounded once to the head's dtype. One backward pass per forward pass, and no second derivative:
    either raises a RuntimeError.

    Under autocast, hidden states and head are rounded to its dtype as in a linear layer; the rest stays float32.

    Args:
        hidden_states: `[..., H]` final hidden states; floating point.
        weight: `[V, H]` rows of the head, which has no bias. A plain tensor: of a DTensor pass `full_tensor()`, or
            `to_local()` together with `vocab_group`.
        labels: `[...]` integer, the target of each row, already shifted: 0 to V - 1 or `ignore_index`.
        num_tokens: Divisor, > 0: the number of labels over all ranks and micro-batches of a step, so that gradients
            summed over them are those of the mean. None for the number of labels given here.
        ignore_index: Label of rows without a loss.
        chunk_rows: Rows whose logits are held at once, >= 1; memory grows by 4 V bytes for each, time falls.
        vocab_group: Ranks over which the rows of the head are spread in rank order, evenly or not. Labels count
            through the whole vocabulary.

    Returns:
        0-d float32 (float64 for float64 inputs).

    Raises:
        ValueError: When shapes, dtypes or settings do not fit, or a label is outside the vocabulary.

    Distributed: with `vocab_group`, every rank passes the same hidden states and labels and gets the same loss, the
        complete gradient of the hidden states and the gradient of its own rows of the head: nothing is left to reduce
        over this group. One all-gather of two integers, then per chunk one all-reduce of `[R]` (maximum) and one of
        `[2, R]` (sum of exponentials, target logit), and one of the hidden gradient `[T, H]` in float32. Without it,
        no collectives.
    """
    _check_inputs(hidden_states, weight, labels, chunk_rows)
    rows_TH, labels_T = hidden_states.reshape(-1, weight.shape[1]), labels.reshape(-1)
    kept = (labels_T != ignore_index).nonzero().squeeze(1)
    shards = gather_counts([len(weight), len(kept)], vocab_group, weight.device)
    if any(num_rows != len(kept) for _, num_rows in shards):
        raise ValueError(
            f"labels: all ranks of vocab_group must pass the same, got {[num for _, num in shards]} labels by rank"
        )
    rank = 0 if vocab_group is None else vocab_group.rank()
    sizes = [num_vocabulary for num_vocabulary, _ in shards]
    _check_labels(labels_T, kept, sum(sizes), ignore_index)
    divisor = float(len(kept) if num_tokens is None else num_tokens)
    if len(kept) and not divisor > 0:
        raise ValueError(f"num_tokens: must be > 0 when there are labels, got {divisor}; pass the global count")
    needs_gradient = torch.is_grad_enabled()
    task = _Task(
        kept=kept,
        # counted from the first row of this rank's part of the head; outside of it for labels of other ranks
        labels=labels_T[kept].long() - sum(sizes[:rank]),
        num_tokens=divisor if len(kept) else 1.0,
        chunk_rows=chunk_rows,
        compute_dtype=_compute_dtype(hidden_states),
        needs_hidden=needs_gradient and hidden_states.requires_grad,
        needs_weight=needs_gradient and weight.requires_grad,
        group=vocab_group,
    )
    loss: torch.Tensor = _LinearCrossEntropy.apply(rows_TH, weight, task)
    return loss


def _check_inputs(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int) -> None:
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        # `type`, because a DTensor is a Tensor whose products would be collectives of their own
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{name}: must be a plain tensor, got {type(tensor).__name__}; pass its to_local()")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: must be floating point, got {tensor.dtype}")
    if weight.dim() != 2 or hidden_states.dim() == 0 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: must be [V, H] for hidden_states [..., H], got {list(weight.shape)} for "
            f"{list(hidden_states.shape)}"
        )
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels: must have one label per row, {list(hidden_states.shape[:-1])}, got {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: must be integers, got {labels.dtype}")
    if hidden_states.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(
            f"weight: must have the dtype of hidden_states, {hidden_states.dtype}, got {weight.dtype}; cast one of "
            "them or use autocast"
        )
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: must be >= 1, got {chunk_rows}")


def _check_labels(labels_T: torch.Tensor, kept: torch.Tensor, num_vocabulary: int, ignore_index: int) -> None:
    outside = kept[(labels_T[kept] < 0) | (labels_T[kept] >= num_vocabulary)]
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"labels: row {row} is {int(labels_T[row])}, must be 0 to {num_vocabulary - 1} or {ignore_index} for no "
            f"loss; {len(outside)} of {len(kept)} labels are outside the vocabulary of the head"
        )


def _compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """The dtype inputs are rounded to before products, as a linear layer would."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype


@dataclass(frozen=True)
class _Task:
    """What one call computes: `kept` `[T']` rows with a label, their `labels` `[T']` within this rank's head."""

    kept: torch.Tensor
    labels: torch.Tensor
    num_tokens: float
    chunk_rows: int
    compute_dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    group: dist.ProcessGroup | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in forward; backward scales them and puts the rows back in place."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, task: _Task) -> torch.Tensor:
        with torch.autocast(weight_VH.device.type, enabled=False), bfloat16_products(task.compute_dtype):
            loss, hidden_grad, weight_grad = _loss_and_gradients(hidden_TH, weight_VH, task)
        ctx.gradients = (hidden_grad, weight_grad)
        ctx.task, ctx.num_rows, ctx.dtypes = task, len(hidden_TH), (hidden_TH.dtype, weight_VH.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        # grad mode is on here only under create_graph; `once_differentiable` lets that pass in silence
        if torch.is_grad_enabled():
            raise RuntimeError("backward: create_graph asks for a second derivative, which this loss does not have")
        if ctx.gradients is None:
            raise RuntimeError("backward: its gradients were handed over in the first backward pass; run forward again")
        (hidden_grad, weight_grad), ctx.gradients = ctx.gradients, None
        if hidden_grad is not None:
            rows = hidden_grad.mul_(grad).to(ctx.dtypes[0])
            hidden_grad = rows.new_zeros(ctx.num_rows, rows.shape[1]).index_copy_(0, ctx.task.kept, rows)
        if weight_grad is not None:
            # scaled in float32, so that the only rounding is the one to the dtype of the head
            weight_grad = weight_grad.mul_(grad / ctx.task.num_tokens).to(ctx.dtypes[1])
        return hidden_grad, weight_grad, None


def _loss_and_gradients(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, task: _Task
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss; gradient `[T', H]` of the kept rows; gradient `[V, H]` of the head before its division by `num_tokens`."""
    num_kept, hidden_size = len(task.kept), weight_VH.shape[1]
    head = TiledHead(weight_VH, task.compute_dtype)
    # float16 has no room for a gradient divided by num_tokens before a loss scale multiplies it; partial gradients are
    # summed over ranks before they are rounded.
    wide = task.group is not None or task.compute_dtype == torch.float16
    hidden_grad = weight_grad = None
    if task.needs_hidden:
        hidden_grad = hidden_TH.new_empty(num_kept, hidden_size, dtype=head.sum_dtype if wide else None)
    if task.needs_weight:
        weight_grad = torch.zeros_like(weight_VH, dtype=head.sum_dtype)
    loss = hidden_TH.new_zeros((), dtype=head.sum_dtype)
    memory = loss.new_empty(head.round_rows(min(task.chunk_rows, num_kept)) * len(weight_VH))
    for start in range(0, num_kept, task.chunk_rows):
        chunk = slice(start, start + task.chunk_rows)
        num_rows = len(task.kept[chunk])
        missing = head.round_rows(num_rows) - num_rows
        # rows of zeros without a label: they add nothing to the gradient of the head, and their loss is left out
        hidden_RH = F.pad(head.operand(hidden_TH[task.kept[chunk]]), (0, 0, 0, missing))
        labels_R = F.pad(task.labels[chunk], (0, missing), value=-1)
        tiles, log_sum_R, target_R = _first_walk(head, hidden_RH, labels_R, memory, task.group)
        loss += (log_sum_R - target_R)[:num_rows].sum() / task.num_tokens
        if hidden_grad is None and weight_grad is None:
            continue
        grad_RH = None if hidden_grad is None else torch.zeros_like(hidden_RH, dtype=head.sum_dtype)
        for tile in tiles:
            error_RK = _error(tile, log_sum_R, labels_R).to(head.operand_dtype)
            if grad_RH is not None:
                head.add_product(grad_RH, error_RK, head.tile(tile.start, tile.end))
            if weight_grad is not None:
                head.add_product(weight_grad[tile.start : tile.end], error_RK.T, hidden_RH)
        if hidden_grad is not None and grad_RH is not None:
            hidden_grad[chunk] = grad_RH[:num_rows].div_(task.num_tokens)
    if task.group is not None and hidden_grad is not None and num_kept:
        dist.all_reduce(hidden_grad, group=task.group)
    return loss, hidden_grad, weight_grad


@dataclass(frozen=True)
class _Tile:
    """Vocabulary rows `start` to `end`: exp(logit - maximum) `[R, K]`, and the maximum `[R]` of each row."""

    start: int
    end: int
    exp_RK: torch.Tensor
    maximum_R: torch.Tensor


def _first_walk(
    head: TiledHead,
    hidden_RH: torch.Tensor,
    labels_R: torch.Tensor,
    memory: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[list[_Tile], torch.Tensor, torch.Tensor]:
    """Tiles laid out in `memory`, and over the whole vocabulary the log of the sum of exponentials and the target's
    logit of each row."""
    num_rows, tiles = len(hidden_RH), []
    target_R = memory.new_zeros(num_rows)
    # neutral elements for a rank that holds no rows of the head
    maxima, sums = [torch.full_like(target_R, -math.inf)], [torch.zeros_like(target_R)]
    for start, end in head.ranges():
        logits_RK = memory[num_rows * start : num_rows * end].view(num_rows, end - start)
        head.product(hidden_RH, head.tile(start, end).T, out=logits_RK)
        index_R1, is_inside_R1 = _within(labels_R, start, end)
        target_R += torch.where(is_inside_R1, logits_RK.gather(1, index_R1), 0).squeeze(1)
        maxima.append(logits_RK.amax(1))
        sums.append(logits_RK.sub_(maxima[-1][:, None]).exp_().sum(1))
        tiles.append(_Tile(start, end, logits_RK, maxima[-1]))
    maximum_R = torch.stack(maxima).amax(0)
    if group is not None:
        dist.all_reduce(maximum_R, op=dist.ReduceOp.MAX, group=group)
    sum_R = (torch.stack(sums) * (torch.stack(maxima) - maximum_R).exp()).sum(0)
    totals_2R = torch.stack((sum_R, target_R))
    if group is not None:
        dist.all_reduce(totals_2R, group=group)
    return tiles, maximum_R + totals_2R[0].log(), totals_2R[1]


def _error(tile: _Tile, log_sum_R: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    """Probability minus one at the target, `[R, K]`, in the memory of the tile."""
    index_R1, is_inside_R1 = _within(labels_R, tile.start, tile.end)
    error_RK = tile.exp_RK.mul_((tile.maximum_R - log_sum_R).exp()[:, None])
    return error_RK.scatter_add_(1, index_R1, -is_inside_R1.to(error_RK.dtype))


def _within(labels_R: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in a tile, clamped to it, and whether it is there, both `[R, 1]`; no wait for the device."""
    index_R = labels_R - start
    return index_R.clamp(0, end - start - 1)[:, None], ((index_R >= 0) & (index_R < end - start))[:, None]

"""Packed texts: the batch form that spends no work on padding, and the attention that keeps its texts apart.

This file leaves pooling to `pooling` and the choice of texts per batch to its callers. The idea: all linear layers,
norms and activations of a transformer act on one token at a time, so B texts can be laid end to end as one row of T
tokens. Only attention has to know where one text ends. It reaches stock transformers layers through an attention
function registered under `PACKED_ATTENTION`, which receives the lengths as a keyword:

* CPU: one attention call per run of equal-length texts. Texts are laid out by length, so runs are long.
* CUDA: one call of torch's variable-length attention.

Whether a token also sees what follows it in its text is the model's own affair: attention is causal where the layer's
`is_causal` says so, unless the call does. Images are packed the same way: their patches are the tokens.

Position ids restart at every text. They alone do not separate texts: a bidirectional model that is given nothing else
attends across them.

Shapes: B texts, T tokens in all, H hidden size, h heads, d head size.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ostro.models.cpu_linear import round_rows

PACKED_ATTENTION = "ostro_packed"

PACKED_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cpu")
"""The `attention_mask` of a packed call on a causal model: transformers hands a 4-D mask on as it is, so that no
`[T, T]` mask is made, and the attention function keeps texts apart without one."""


@dataclass(frozen=True)
class PackedTexts:
    """B texts laid end to end.

    Attributes:
        input_ids: `[T]` int64 token ids.
        lengths: B lengths in tokens, each at least 1, summing to T.
    """

    input_ids: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_token_ids(cls, token_ids: Sequence[Sequence[int]]) -> PackedTexts:
        """Packs texts in the order given.

        Args:
            token_ids: B sequences of token ids.

        Raises:
            ValueError: When a text has no token.
        """
        lengths = tuple(len(text) for text in token_ids)
        if not lengths or min(lengths) == 0:
            raise ValueError(f"token_ids: every text needs at least one token, got lengths {lengths[:10]}")
        return cls(torch.tensor(list(itertools.chain.from_iterable(token_ids)), dtype=torch.int64), lengths)

    @property
    def num_texts(self) -> int:
        """B, the number of texts."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in all texts."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same texts with `input_ids` on another device."""
        return PackedTexts(self.input_ids.to(device, non_blocking=True), self.lengths)

    def position_ids(self) -> torch.Tensor:
        """`[T]` int64 positions, restarting at 0 for every text."""
        return packed_positions(self.lengths).to(self.input_ids.device, non_blocking=True)

    def cu_seqlens(self) -> torch.Tensor:
        """`[B + 1]` int32 offsets of the texts, the last one T."""
        return packed_offsets(self.lengths).to(self.input_ids.device, non_blocking=True)


def packed_positions(lengths: Sequence[int]) -> torch.Tensor:
    """`[T]` int64 positions on the CPU, restarting at 0 for every text.

    Args:
        lengths: Tokens of each text.
    """
    sizes = torch.tensor(lengths)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return torch.arange(len(starts)) - starts


def packed_offsets(lengths: Sequence[int]) -> torch.Tensor:
    """`[B + 1]` int32 offsets of the texts on the CPU, the last one T.

    Args:
        lengths: Tokens of each text.
    """
    return torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)


def fill_up(packed: PackedTexts) -> PackedTexts:
    """The texts and, where T is not a round number of rows, one more that fills it up.

    Args:
        packed: Texts for a model that computes in low precision on the CPU; see `cpu_linear.round_rows`.
    """
    return fill_to(packed, round_rows(packed.num_tokens))


def packed_rows(num_tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows that T tokens have on their way through a model that computes in `dtype`, see `fill_up`.

    Args:
        num_tokens: T.
        device: Of the model.
        dtype: What it computes in.
    """
    return round_rows(num_tokens) if device.type == "cpu" and dtype != torch.float32 else num_tokens


def fill_to(packed: PackedTexts, num_tokens: int) -> PackedTexts:
    """The texts and, where some are missing, one more that fills them up to so many tokens.

    Args:
        packed: Texts.
        num_tokens: At least theirs.
    """
    missing = num_tokens - packed.num_tokens
    if not missing:
        return packed
    return PackedTexts(F.pad(packed.input_ids, (0, missing)), (*packed.lengths, missing))


def micro_batches(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Groups texts by length so that each group holds at most `micro_batch_tokens` tokens.

    Longest first: a budget that is too large for the memory fails at the first group, not hours in.

    Args:
        lengths: Tokens of each text.
        micro_batch_tokens: Budget per group, >= 1. A text longer than the budget gets a group of its own.

    Returns:
        Groups of indices into `lengths`; every index appears once.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or lengths[index] > room:
            groups.append([])
            room = micro_batch_tokens
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def even_micro_batches(lengths: Sequence[int], micro_batch_tokens: int, num_at_least: int) -> list[list[int]]:
    """Groups texts as `micro_batches` does, but so that all groups have about the same number of tokens.

    Args:
        lengths: Tokens of each text.
        micro_batch_tokens: Budget per group, >= 1. A text longer than the budget gets a group of its own.
        num_at_least: Number of groups, where there are as many texts; more where the budget asks for it.

    Returns:
        Groups of indices into `lengths`; every index appears once.
    """
    num_groups = max(num_at_least, -(-sum(lengths) // micro_batch_tokens))
    while True:
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        totals = [(0, group) for group in range(num_groups)]
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            total, group = totals[0]
            groups[group].append(index)
            heapq.heapreplace(totals, (total + lengths[index], group))
        if all(total <= micro_batch_tokens or len(groups[group]) == 1 for total, group in totals):
            return [group for group in groups if group]
        num_groups += 1


def use_packed_attention(model: PreTrainedModel) -> None:
    """Sets the packed attention function on `model`; padded calls on it keep working, through transformers' own SDPA.

    Args:
        model: A text tower, a vision tower or both in one, whose attention goes through transformers' attention
            interface.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def forward_packed(model: PreTrainedModel, packed: PackedTexts, received: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a text tower on packed texts.

    Equal to a padded forward with the padded rows removed.

    Args:
        model: A tower prepared with `use_packed_attention`.
        packed: The texts, on the model's device.
        received: `[1, T, H]` hidden states of the stage before, in place of the tokens.

    Returns:
        Last hidden states `[T, H]`.
    """
    output = model(
        input_ids=packed.input_ids[None] if received is None else None,
        inputs_embeds=received,
        attention_mask=PACKED_MASK,
        position_ids=packed.position_ids()[None],
        use_cache=False,
        packed_lengths=packed.lengths,
        packed_offsets=packed.cu_seqlens(),
    )
    hidden_states: torch.Tensor = output.last_hidden_state[0]
    return hidden_states


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_lengths: tuple[int, ...] | None = None,
    packed_offsets: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each packed text, in the form transformers calls an attention function.

    Args:
        module: The attention layer; its `is_causal` decides where the call does not.
        query: `[1, h, T, d]`.
        key: `[1, h_kv, T, d]`.
        value: `[1, h_kv, T, d]`.
        attention_mask: Mask of a padded call; that of a packed call is not looked at.
        packed_lengths: Tokens of each text; None for a padded call, which goes to transformers' SDPA.
        packed_offsets: `[B + 1]` int32 offsets of the texts on the device of `query`.
        **kwargs: `scaling`, `dropout`, `sliding_window`, `is_causal` and what else the layer passes.

    Returns:
        The attention output `[1, T, h, d]`, and None for the weights.

    Raises:
        ValueError: When a call has the mask of a packed call, but not the lengths.
    """
    if packed_lengths is None or packed_offsets is None:
        if attention_mask is not None and attention_mask.shape == PACKED_MASK.shape and query.shape[2] > 1:
            raise ValueError("packed_lengths, packed_offsets: missing, while attention_mask is PACKED_MASK; give both")
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    is_causal = kwargs.get("is_causal")
    span = _Span(bool(module.is_causal if is_causal is None else is_causal), kwargs.get("sliding_window"))
    scaling, dropout = kwargs["scaling"], kwargs.get("dropout", 0.0)
    if query.device.type == "cuda" and query.dtype != torch.float32 and not dropout and span.window is None:
        return _attend_varlen(query, key, value, packed_lengths, packed_offsets, scaling, span.causal), None
    return _attend_runs(query, key, value, packed_lengths, scaling, dropout, span), None


@dataclass(frozen=True)
class _Span:
    """Which tokens of its text a token sees.

    Attributes:
        causal: Only itself and those before it.
        window: How far it sees, as transformers counts: causal `i - j < window`, else `|i - j| <= window`; None: all.
    """

    causal: bool
    window: int | None

    def mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """`[L, L]` bool mask; None where the window reaches over the whole text."""
        reach = None if self.window is None else self.window - 1 if self.causal else self.window
        if reach is None or reach >= length - 1:
            return None
        positions = torch.arange(length, device=device)
        distances = positions[:, None] - positions[None, :]
        return (distances >= 0) & (distances <= reach) if self.causal else distances.abs() <= reach


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    offsets: torch.Tensor,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """One call of torch's variable-length attention (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    query_Thd, key_Thd, value_Thd = (states[0].transpose(0, 1) for states in (query, key, value))
    key_Thd, value_Thd = key_Thd.repeat_interleave(groups, 1), value_Thd.repeat_interleave(groups, 1)
    longest = max(lengths)
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only when auxiliary values are asked for
        query_Thd,
        key_Thd,
        value_Thd,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    return output[None]


def _attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float,
    span: _Span,
) -> torch.Tensor:
    """One attention call per run of neighbouring equal-length texts."""
    dtype = query.dtype
    if query.device.type == "cpu" and not torch.is_inference_mode_enabled():
        # torch 2.13's bf16 backward is 2 to 15 times slower than this (16 texts of 64 tokens: 17 against 3 CPU ms);
        # inference mode, and not the absence of gradients: the two passes of a cached step have to be one function
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    runs = [(length, sum(1 for _ in run)) for length, run in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the backward of a split is one concatenation, that of each slice fills a full-size gradient
    pieces = zip(*(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True)
    outputs = []
    for (length, count), run in zip(runs, pieces, strict=True):
        query_nhLd, key_nhLd, value_nhLd = (states.unflatten(1, (count, length)).transpose(0, 1) for states in run)
        mask = span.mask(length, query.device)
        output_nhLd = F.scaled_dot_product_attention(
            query_nhLd,
            key_nhLd,
            value_nhLd,
            mask,
            dropout,
            is_causal=span.causal and mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output_nhLd.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined[None].to(dtype)

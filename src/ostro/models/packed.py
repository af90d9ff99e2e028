"""Packed texts: the batch form that spends no work on padding, and the attention that keeps its texts apart.

This file leaves pooling to `pooling` and the choice of texts per batch to its callers. The idea: all linear layers,
norms and activations of a transformer act on one token at a time, so B texts can be laid end to end as one row of T
tokens. Only attention has to know where one text ends. It reaches stock transformers layers through an attention
function registered under `PACKED_ATTENTION`, which receives the lengths as a keyword:

* CPU: one unmasked attention call per run of equal-length texts. Texts are laid out by length, so runs are long.
* CUDA: one call of torch's variable-length attention.

Position ids restart at every text. They alone do not separate texts: a bidirectional model that is given nothing else
attends across them.

Shapes: B texts, T tokens in all, H hidden size, h heads, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "ostro_packed"

# Up to this many tokens a bf16 text on CPU takes plain matrix products: torch 2.13's fused CPU kernel is 2 to 10 times
# slower there (backward of 20 texts of 49 tokens: 11.6 against 0.7 CPU ms). Beyond it the [L, L] scores that the
# products keep for the backward pass cost more memory than the time is worth.
_PLAIN_PRODUCT_TOKENS = 256


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
        lengths = torch.tensor(self.lengths)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return (torch.arange(self.num_tokens) - starts).to(self.input_ids.device, non_blocking=True)

    def cu_seqlens(self) -> torch.Tensor:
        """`[B + 1]` int32 offsets of the texts, the last one T."""
        offsets = torch.tensor((0, *itertools.accumulate(self.lengths)), dtype=torch.int32)
        return offsets.to(self.input_ids.device, non_blocking=True)


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


def use_packed_attention(model: PreTrainedModel) -> None:
    """Sets the packed attention function on `model`; padded calls on it keep working, through transformers' own SDPA.

    Args:
        model: A bidirectional text tower whose attention goes through transformers' attention interface.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def forward_packed(model: PreTrainedModel, packed: PackedTexts) -> torch.Tensor:
    """Runs a bidirectional text tower on packed texts.

    Equal to a padded forward with the padded rows removed.

    Args:
        model: A tower prepared with `use_packed_attention`.
        packed: The texts, on the model's device.

    Returns:
        Last hidden states `[T, H]`.
    """
    output = model(
        input_ids=packed.input_ids[None],
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
    """Bidirectional attention within each packed text, in the form transformers calls an attention function.

    Args:
        module: The attention layer.
        query: `[1, h, T, d]`.
        key: `[1, h_kv, T, d]`.
        value: `[1, h_kv, T, d]`.
        attention_mask: Mask of a padded call; packed calls have none.
        packed_lengths: Tokens of each text; None for a padded call, which goes to transformers' SDPA.
        packed_offsets: `[B + 1]` int32 offsets of the texts on the device of `query`.
        **kwargs: `scaling`, `dropout`, `sliding_window` and what else the layer passes.

    Returns:
        The attention output `[1, T, h, d]`, and None for the weights.
    """
    if packed_lengths is None or packed_offsets is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    scaling, dropout, window = kwargs["scaling"], kwargs.get("dropout", 0.0), kwargs.get("sliding_window")
    if query.device.type == "cuda" and query.dtype != torch.float32 and not dropout and window is None:
        return _attend_varlen(query, key, value, packed_lengths, packed_offsets, scaling), None
    return _attend_runs(query, key, value, packed_lengths, scaling, dropout, window), None


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    offsets: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """One call of torch's variable-length attention (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    query_Thd, key_Thd, value_Thd = (states[0].transpose(0, 1) for states in (query, key, value))
    key_Thd, value_Thd = key_Thd.repeat_interleave(groups, 1), value_Thd.repeat_interleave(groups, 1)
    longest = max(lengths)
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only when auxiliary values are asked for
        query_Thd, key_Thd, value_Thd, offsets, offsets, longest, longest, scale=scaling
    )
    return output[None]


def _attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """One attention call per run of neighbouring equal-length texts."""
    runs = [(length, sum(1 for _ in run)) for length, run in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the backward of a split is one concatenation, that of each slice fills a full-size gradient
    pieces = zip(*(states[0].split(sizes, dim=1) for states in (query, key, value)), strict=True)
    low_precision_cpu = query.device.type == "cpu" and query.dtype != torch.float32
    outputs = []
    for (length, count), run in zip(runs, pieces, strict=True):
        query_nhLd, key_nhLd, value_nhLd = (states.unflatten(1, (count, length)).transpose(0, 1) for states in run)
        mask = _window_mask(length, window, query.device)
        if low_precision_cpu and length <= _PLAIN_PRODUCT_TOKENS and mask is None and not dropout:
            output_nhLd = _attend_plain(query_nhLd, key_nhLd, value_nhLd, scaling)
        else:
            output_nhLd = F.scaled_dot_product_attention(
                query_nhLd,
                key_nhLd,
                value_nhLd,
                mask,
                dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        outputs.append(output_nhLd.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _attend_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of `[n, h, L, d]` as two matrix products.

    Heads that share a key head are laid along L, so keys are not repeated.
    """
    heads, length = query.shape[1:3]
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    scores = grouped @ key.transpose(-1, -2) * scaling
    # float32: as in transformers' eager attention, a bf16 softmax would lose the tail
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(query.shape[0], heads, length, -1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Symmetric, inclusive window `|i - j| <= window` as a `[L, L]` bool mask; None when all tokens see each other."""
    if window is None or window >= length - 1:
        return None
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions[None, :]).abs() <= window

"""Pooling: from the hidden state of every token to the vector (or vectors) of a text.

It leaves normalisation to the embedder and the choice of pooling to the config. Each kind is defined twice, for padded
texts with a mask (`pool`) and for texts laid end to end with their lengths (`pool_packed`); the two agree.

| pool_type | vector of a text with hidden states h_1 ... h_n |
|---|---|
| `avg`, `mean` | (h_1 + ... + h_n) / n |
| `weighted_avg` | (1 h_1 + 2 h_2 + ... + n h_n) / (1 + ... + n): weighted by position, later tokens count more |
| `cls` | h_1 |
| `last` | h_n |
| `colbert`, `multi_vector` | h_1 ... h_n, one vector per token |

Shapes: B texts, S padded length, T tokens of all texts together, H hidden size.
"""

from __future__ import annotations

import torch

POOL_TYPES = ("avg", "mean", "weighted_avg", "cls", "last", "colbert", "multi_vector")
"""Every `pool_type`; `mean` is another name of `avg`, `multi_vector` of `colbert`."""


def check_pool_type(pool_type: str) -> None:
    """Raises ValueError when `pool_type` is not one of `POOL_TYPES`."""
    if pool_type not in POOL_TYPES:
        raise ValueError(f"pooling: must be one of {', '.join(POOL_TYPES)}, got {pool_type!r}")


def pool(last_hidden_states: torch.Tensor, attention_mask: torch.Tensor, pool_type: str) -> torch.Tensor:
    """Pools padded texts; right on either padding side, also within one batch.

    Args:
        last_hidden_states: `[B, S, H]`.
        attention_mask: `[B, S]`, non-zero for tokens and zero for padding, bool or number.
        pool_type: One of `POOL_TYPES`.

    Returns:
        `[B, H]` in the dtype of the hidden states, summed in float32; for `colbert` `[B, S, H]`, zero where padded.

    Raises:
        ValueError: When a row has no token, or `pool_type` is unknown.

    Source:
        `weighted_avg`: Muennighoff 2022, SGPT, equation 2 (arXiv:2202.08904).
    """
    check_pool_type(pool_type)
    mask_BS = attention_mask.to(last_hidden_states.device).bool()
    empty = (~mask_BS.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"attention_mask: every row needs at least one token, rows {empty[:10]} have none")
    # masked_fill, not a product: a padded position that holds inf or nan must not reach the sum
    kept_BSH = last_hidden_states.masked_fill(~mask_BS[:, :, None], 0)
    if pool_type in ("colbert", "multi_vector"):
        return kept_BSH
    rows = torch.arange(len(mask_BS), device=mask_BS.device)
    if pool_type == "cls":
        return last_hidden_states[rows, mask_BS.int().argmax(1)]
    if pool_type == "last":
        columns = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        return last_hidden_states[rows, (mask_BS * columns).argmax(1)]
    weight_BS = mask_BS.float() if pool_type in ("avg", "mean") else (mask_BS * mask_BS.cumsum(1)).float()
    # float32: a bf16 sum over a few hundred tokens loses the small terms
    sum_BH = (kept_BSH.float() * weight_BS[:, :, None]).sum(1)
    return (sum_BH / weight_BS.sum(1, keepdim=True)).to(last_hidden_states.dtype)


def pool_packed(hidden_states: torch.Tensor, lengths: tuple[int, ...], pool_type: str) -> torch.Tensor:
    """Pools texts laid end to end.

    Equal to `pool` on the same texts padded. On CUDA the sums of `avg` and `weighted_avg` are added in no fixed order,
    unless `torch.use_deterministic_algorithms` is on.

    Args:
        hidden_states: `[T, H]`.
        lengths: Tokens of each of the B texts, each at least 1, summing to T.
        pool_type: One of `POOL_TYPES`.

    Returns:
        `[B, H]` in the dtype of the hidden states, summed in float32; for `colbert` the `[T, H]` given.

    Raises:
        ValueError: When a text has no token, the lengths do not sum to T, or `pool_type` is unknown.
    """
    check_pool_type(pool_type)
    num_tokens = len(hidden_states)
    empty = [text for text, length in enumerate(lengths) if length < 1]
    if empty:
        raise ValueError(f"lengths: every text needs at least one token, texts {empty[:10]} have none")
    if sum(lengths) != num_tokens:
        raise ValueError(f"lengths: must sum to the {num_tokens} tokens given, got {sum(lengths)}")
    if pool_type in ("colbert", "multi_vector"):
        return hidden_states
    device = hidden_states.device
    length_B = torch.tensor(lengths, device=device)
    end_B = length_B.cumsum(0)
    if pool_type == "cls":
        return hidden_states[end_B - length_B]
    if pool_type == "last":
        return hidden_states[end_B - 1]
    text_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), length_B, output_size=num_tokens)
    weighted_TH, total_B = hidden_states.float(), length_B.float()
    if pool_type == "weighted_avg":
        position_T = torch.arange(1, num_tokens + 1, device=device) - (end_B - length_B)[text_T]
        weighted_TH, total_B = weighted_TH * position_T[:, None], total_B * (total_B + 1) / 2
    sum_BH = torch.zeros(len(lengths), hidden_states.shape[1], device=device).index_add(0, text_T, weighted_TH)
    return (sum_BH / total_B[:, None]).to(hidden_states.dtype)

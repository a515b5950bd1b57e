"""Packed attention by torch's SDPA, one call for each sample: runs everywhere, exact in fp32.

Samples of one length are a batch and take a single call. Windows and caps are computed in blocks of
queries, so that no score matrix of a whole sample exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models.attention.contract import Packing, RowMemo, Scoring

_QUERY_BLOCK_TOKENS = 512


class PerSample:
    """SDPA over each sample of a row."""

    name = "sdpa"

    def __init__(self) -> None:
        self._lengths: RowMemo[tuple[list[int], list[int]]] = RowMemo()

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """Takes every call. See `Backend`."""
        return None

    def attend(
        self,
        query_UHD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        packing: Packing,
        scoring: Scoring,
    ) -> Tensor:
        """See `Backend`."""
        # Reading the boundaries waits for the device: once for a row.
        queries, keys = self._lengths.get(packing, make=lambda: _lengths(packing))
        query, key, value = (x.transpose(0, 1)[None] for x in (query_UHD, key_THD, value_THD))
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        plain = scoring.window is None and scoring.softcap is None
        if plain and len(set(keys)) == 1 and queries == keys:
            return _equal(query, key, value, len(keys), packing.causal, scoring)
        parts = [
            one_sample(*part, causal=packing.causal, scoring=scoring)
            for part in zip(
                torch.split(query, queries, dim=2),
                torch.split(key, keys, dim=2),
                torch.split(value, keys, dim=2),
                strict=True,
            )
        ]
        return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def _lengths(packing: Packing) -> tuple[list[int], list[int]]:
    keys: list[int] = packing.cu_seqlens.diff().tolist()
    if packing.cu_queries is None:
        return keys, keys
    queries: list[int] = packing.cu_queries.diff().tolist()
    return queries, keys


def repeat_heads(query: Tensor, x: Tensor) -> Tensor:
    """Repeats key heads [B, H_kv, T, D] for the query heads [B, H, ...] that share them."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _equal(
    query: Tensor, key: Tensor, value: Tensor, num_samples: int, causal: bool, scoring: Scoring
) -> Tensor:
    """Samples of one length as a batch: [1, H, T, D] -> [T, H, D]."""
    heads = query.shape[1]
    query, key, value = (
        x.squeeze(0).reshape(heads, num_samples, -1, x.shape[-1]).transpose(0, 1)
        for x in (query, key, value)
    )
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=scoring.dropout, is_causal=causal, scale=scoring.scale
    )
    return out.transpose(1, 2).reshape(-1, heads, value.shape[-1])


def one_sample(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scoring: Scoring
) -> Tensor:
    """Attention of (the end of) one sample.

    Args:
        query: [1, H, U, D].
        key: [1, H, L, D].
        value: [1, H, L, D].
        causal: Whether a position sees only itself and what is before it.
        scoring: How scores become weights.

    Returns:
        [1, H, U, D].
    """
    num_queries, length = query.shape[2], key.shape[2]
    if num_queries == 0:
        return query
    window = scoring.window if scoring.window is not None and scoring.window < length else None
    if scoring.softcap is None and window is None and (not causal or num_queries == length):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=scoring.dropout, is_causal=causal, scale=scoring.scale
        )
    offset = length - num_queries
    blocks = []
    for start in range(0, num_queries, _QUERY_BLOCK_TOKENS):
        stop = min(start + _QUERY_BLOCK_TOKENS, num_queries)
        last = offset + stop if causal else length
        first = 0 if window is None else max(0, offset + start - window + 1)
        rows = torch.arange(offset + start, offset + stop, device=query.device)[:, None]
        columns = torch.arange(first, last, device=query.device)[None, :]
        seen = columns <= rows if causal else torch.ones_like(columns <= rows)
        if window is not None:
            seen &= columns > rows - window
        blocks.append(
            masked(
                query[:, :, start:stop],
                key[:, :, first:last],
                value[:, :, first:last],
                seen,
                scoring,
            )
        )
    return torch.cat(blocks, dim=2)


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """Attention where `seen` (boolean) allows it, scores capped when a cap is given.

    Args:
        query: [B, H, U, D].
        key: [B, H, T, D].
        value: [B, H, T, D].
        seen: bool, broadcast to [B, H, U, T].
        scoring: Scale, cap and dropout; the window is part of `seen`.

    Returns:
        [B, H, U, D].
    """
    cap = scoring.softcap
    if cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=scoring.dropout, scale=scoring.scale
        )
    factor = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = cap * torch.tanh(query @ key.transpose(-1, -2) * (factor / cap))
    # Not -inf: a padding row sees nothing, and the softmax of nothing would be NaN.
    scores = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return F.dropout(weights.to(value.dtype), scoring.dropout) @ value

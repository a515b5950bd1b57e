"""Attention over packed rows, registered under one name for every transformers decoder.

A packed row's mask is not a mask: its place is taken by an int32 tensor that holds `cu_seqlens`,
which transformers hands to each layer untouched. A decoder that drops it cannot mix samples up
quietly, because no attention function is called without it. Nothing of size T x T is made.
Padded batches (generation) go through torch's SDPA as transformers does it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.types import Tail

PACKED_ATTENTION = "vistune_packed"
_QUERY_BLOCK_TOKENS = 512
_HALF = (torch.float16, torch.bfloat16)
# What decoders pass along that does not change the result of attention.
_HARMLESS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "use_cache",
    }
)


def register_packed_attention() -> str:
    """Makes the attention known to transformers (again is harmless) and returns its name."""
    _compat.register_attention(PACKED_ATTENTION, packed_attention)
    return PACKED_ATTENTION


def packing_mask(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Returns what stands in for the attention mask of a packed row.

    Args:
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample; carried as a size, so that reading it never waits
            for the device.

    Returns:
        int32 [1, 1, max_seqlen, S + 1], a view without memory of its own.
    """
    row = cu_seqlens.to(torch.int32).view(1, 1, 1, -1)
    return row.expand(1, 1, max_seqlen, -1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within samples when the mask is a packing mask, as SDPA otherwise.

    Args:
        module: The attention module that asks.
        query: [B, H, T, D].
        key: [B, H_kv, T', D].
        value: [B, H_kv, T', D].
        attention_mask: A packing mask, a boolean mask, or None for plain causal attention.
        dropout: Probability of dropping a score.
        scaling: Factor on the scores; 1 / sqrt(D) when left out.
        sliding_window: Positions a token sees, itself included.
        softcap: Scores are squashed into (-softcap, softcap).
        is_causal: Given by some decoders; packed rows are always causal.
        kwargs: Whatever else the decoder passes; anything that would change the result is refused.

    Returns:
        [B, T, H, D], and None in place of the weights.

    Raises:
        ModelError: The decoder asks for something a packed row cannot do.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} wants attention that packed rows do not offer",
            got=", ".join(unknown),
            fix="use another language model",
        )
    if attention_mask is None or attention_mask.dtype is not torch.int32:
        out = _plain(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            softcap=softcap,
            is_causal=is_causal,
        )
        return out, None
    one_way = is_causal is not False and bool(getattr(module, "is_causal", True))
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not one_way:
        raise ModelError(
            f"{type(module).__name__} does not attend as a packed row needs",
            got=f"queries {tuple(query.shape)}, keys {tuple(key.shape)}, causal {one_way}",
            expected="one row, no key-value cache, causal attention",
        )
    return (
        _packed(
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
        ),
        None,
    )


def attend_packed(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row, outside a transformers layer.

    Args:
        query_THD: [T, H, D].
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample.
        window: Positions a token sees, itself included; None for all before it.

    Returns:
        [T, H, D].
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD))
    packing = packing_mask(cu_seqlens, max_seqlen)
    return _packed(q, k, v, packing, dropout=0.0, scale=None, window=window, softcap=None).squeeze(
        0
    )


def attend_tail(
    query_UHD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    *,
    tail: Tail,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    """Causal attention of the last positions of each sample of a packed row.

    Args:
        query_UHD: [U, H, D]; for each sample its last positions.
        key_THD: [T, H_kv, D].
        value_THD: [T, H_kv, D].
        tail: Where the queries stand.
        cu_seqlens: int32 [S + 1], boundaries of the keys.
        max_seqlen: Tokens of the longest sample.

    Returns:
        [U, H, D].
    """
    if query_UHD.is_cuda and value_THD.dtype in _HALF:
        return _compat.varlen_attention(
            query_UHD.to(value_THD.dtype),
            key_THD.to(value_THD.dtype),
            value_THD,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            scale=None,
            window=None,
            cu_queries=tail.cu_seqlens,
            max_queries=tail.max_seqlen,
        )
    query, key, value = (x.transpose(0, 1)[None] for x in (query_UHD, key_THD, value_THD))
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    queries, keys = tail.cu_seqlens.diff().tolist(), cu_seqlens.diff().tolist()
    parts = []
    for q, k, v in zip(
        torch.split(query, queries, dim=2),
        torch.split(key, keys, dim=2),
        torch.split(value, keys, dim=2),
        strict=True,
    ):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril(k.shape[2] - q.shape[2])
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Tensor,
    *,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Returns [1, T, H, D]."""
    cu_seqlens, max_seqlen = packing[0, 0, 0], packing.shape[2]
    if window is not None and window >= max_seqlen:
        window = None
    if query.dtype is not value.dtype:  # rotary tables in fp32 under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    head_dim = query.shape[-1]
    if (
        query.is_cuda
        and value.dtype in _HALF
        and softcap is None
        and dropout == 0.0
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= 256
    ):
        out = _compat.varlen_attention(
            query.squeeze(0).transpose(0, 1),
            key.squeeze(0).transpose(0, 1),
            value.squeeze(0).transpose(0, 1),
            cu_seqlens=cu_seqlens.contiguous(),
            max_seqlen=max_seqlen,
            scale=scale,
            window=window,
        )
        return out.unsqueeze(0)
    lengths = cu_seqlens.diff().tolist()
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    num_heads = query.shape[1]
    if window is None and softcap is None and len(set(lengths)) == 1:
        # Samples of one length are a batch: one kernel call instead of one per sample.
        query, key, value = (
            x.squeeze(0).reshape(num_heads, len(lengths), lengths[0], -1).transpose(0, 1)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale
        )
        return out.transpose(1, 2).reshape(1, -1, num_heads, head_dim)
    parts = [
        _one_sample(*part, dropout=dropout, scale=scale, window=window, softcap=softcap)
        for part in zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _repeat_heads(query: Tensor, x: Tensor) -> Tensor:
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _one_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one sample with itself: [1, H, L, D] -> [1, H, L, D]."""
    length = query.shape[2]
    if softcap is None and (window is None or length <= window):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale
        )
    blocks = []
    for start in range(0, length, _QUERY_BLOCK_TOKENS):
        stop = min(start + _QUERY_BLOCK_TOKENS, length)
        first = 0 if window is None else max(0, start - window + 1)
        rows = torch.arange(start, stop, device=query.device)[:, None]
        columns = torch.arange(first, stop, device=query.device)[None, :]
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        blocks.append(
            _masked(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                seen,
                dropout=dropout,
                scale=scale,
                softcap=softcap,
            )
        )
    return torch.cat(blocks, dim=2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    dropout: float,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention where `seen` (boolean) allows it, scores capped when a cap is given."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scale
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (factor / softcap))
    # Not -inf: a padding row sees nothing, and the softmax of nothing would be NaN.
    scores = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return F.dropout(weights.to(value.dtype), dropout) @ value


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    is_causal: bool | None,
) -> Tensor:
    """Attention of a batch, as transformers' SDPA; torch's SDPA has no cap, so that is written."""
    if softcap is None:
        out, _ = _compat.sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
        )
        assert isinstance(out, Tensor)
        return out
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    if mask is None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        seen = seen.tril(num_keys - num_queries)
    else:
        seen = mask[..., : key.shape[2]]
    out = _masked(query, key, value, seen, dropout=dropout, scale=scaling, softcap=softcap)
    return out.transpose(1, 2).contiguous()

"""Attention over packed rows whose tokens see some of what follows them in their sample.

An image's tokens see all of their image (Gemma 3); a prompt's tokens see all of the prompt
(PaliGemma). For each token the row says how far it sees: `reach`. Samples without such tokens are
plain causal ones. The others take torch's SDPA with a mask of 512 queries at a time over their own
sample; nothing of size T x T is made. It stands beside the backends, none of which has such masks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention.contract import Packing, RowMemo, Scoring
from vistune.models.attention.interface import packed_attention, refuse_unknown
from vistune.models.attention.per_sample import masked, one_sample, repeat_heads

_NAMES = {True: "vistune_ahead", False: "vistune_ahead_free"}
_QUERY_BLOCK_TOKENS = 512


def register_ahead_attention(*, window_binds: bool) -> str:
    """Makes this attention known to transformers (again is harmless) and returns its name there.

    Args:
        window_binds: Whether a layer's sliding window also bounds what a token sees back in its own
            run; otherwise runs begin where samples do, and see all of themselves.
    """
    attention = partial(ahead_attention, window_binds=window_binds, memo=RowMemo())
    _compat.register_attention(_NAMES[window_binds], attention)
    return _NAMES[window_binds]


def ahead_mask(cu_seqlens: Tensor, max_seqlen: int, reach_T: Tensor) -> Tensor:
    """Returns what stands in for the attention mask of a packed row.

    Args:
        cu_seqlens: int32 [S + 1].
        max_seqlen: Tokens of the longest sample.
        reach_T: [T]; the last position in the row that each token sees, itself or behind it, in its
            own sample.

    Returns:
        int32 [1, S + 1, max_seqlen, S + 1 + T], a view of one row.
    """
    row = torch.cat((cu_seqlens.to(torch.int32), reach_T.to(torch.int32))).view(1, 1, 1, -1)
    return row.expand(1, cu_seqlens.shape[0], max_seqlen, -1)


def reach_of_runs(in_run_T: Tensor) -> Tensor:
    """Returns how far tokens see that see all of the run they are in.

    Args:
        in_run_T: bool [T]; runs are ended by a token outside.

    Returns:
        int64 [T]; the run's last position, or the token's own outside of runs.
    """
    length = in_run_T.shape[0]
    place_T = torch.arange(length, device=in_run_T.device)
    # The next position outside, found from behind.
    outside_T = torch.where(in_run_T, length, place_T)
    next_T = outside_T.flip(0).cummin(0).values.flip(0)
    return torch.where(in_run_T, next_T - 1, place_T)


def reach_of_prefixes(cu_seqlens: Tensor, lengths_S: Tensor) -> Tensor:
    """Returns how far tokens see where each sample's beginning sees all of itself.

    Args:
        cu_seqlens: int32 [S + 1].
        lengths_S: int64 [S]; tokens of each sample's beginning.

    Returns:
        int64 [T].
    """
    starts_S, sizes_S = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    last_T = (starts_S + lengths_S - 1).repeat_interleave(sizes_S)
    return torch.maximum(last_T, torch.arange(last_T.shape[0], device=last_T.device))


def ahead_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    window_binds: bool,
    memo: RowMemo[list[tuple[int, bool]]],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within samples, each token as far as it sees; as `packed_attention` otherwise.

    Args:
        module: The attention module that asks.
        query: [B, H, T, D].
        key: [B, H_kv, T', D].
        value: [B, H_kv, T', D].
        attention_mask: From `ahead_mask`, or any that `packed_attention` takes.
        window_binds: See `register_ahead_attention`.
        memo: Of the row's lengths.
        dropout: Probability of dropping a weight.
        scaling: Factor on the scores; 1 / sqrt(D) when left out.
        sliding_window: Positions a token sees back, itself included.
        softcap: Scores are squashed into (-softcap, softcap).
        is_causal: Not asked: the mask says it.
        kwargs: See `packed_attention`.

    Returns:
        [B, T, H, D], and None in place of the weights.

    Raises:
        ModelError: The decoder asks for something a packed row cannot do.
    """
    mask = attention_mask
    if mask is None or mask.dtype is not torch.int32 or mask.shape[1] == 1:
        return packed_attention(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            is_causal=is_causal,
            **kwargs,
        )
    refuse_unknown(module, kwargs)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"{type(module).__name__} does not attend as a packed row needs",
            got=f"queries {tuple(query.shape)}, keys {tuple(key.shape)}",
            expected="one row, no key-value cache",
        )
    scoring = Scoring(scaling, sliding_window, softcap, dropout)
    return _row(query, key, value, mask, scoring, window_binds=window_binds, memo=memo), None


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scoring: Scoring,
    *,
    window_binds: bool,
    memo: RowMemo[list[tuple[int, bool]]],
) -> Tensor:
    """Attention of a packed row, sample by sample: [1, T, H, D]."""
    num_edges, row = mask.shape[1], mask[0, 0, 0]
    packing = Packing(row[:num_edges], mask.shape[2])
    reach_T = row[num_edges:]
    samples = memo.get(packing, make=lambda: _samples(packing.cu_seqlens, reach_T))
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    lengths = [length for length, _ in samples]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    parts, start = [], 0
    for (length, looks), q, k, v in zip(samples, queries, keys, values, strict=True):
        if looks:
            reach_L = reach_T[start : start + length] - start
            parts.append(_looking(q, k, v, reach_L, scoring, window_binds=window_binds))
        else:
            parts.append(one_sample(q, k, v, causal=True, scoring=scoring))
        start += length
    return torch.cat(parts, dim=2).transpose(1, 2)


def _samples(cu_seqlens: Tensor, reach_T: Tensor) -> list[tuple[int, bool]]:
    """Length of each sample, and whether any of its tokens sees what follows it."""
    looks_T = reach_T > torch.arange(reach_T.shape[0], device=reach_T.device)
    total = torch.nn.functional.pad(looks_T.cumsum(0), (1, 0))
    looks_S = total[cu_seqlens.long()].diff()
    found = torch.stack((cu_seqlens.diff().long(), looks_S)).tolist()
    return [(int(length), bool(looks)) for length, looks in zip(*found, strict=True)]


def _looking(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach_L: Tensor,
    scoring: Scoring,
    *,
    window_binds: bool,
) -> Tensor:
    """Attention of one sample, [1, H, L, D]."""
    length, window = query.shape[2], scoring.window
    columns = torch.arange(length, device=query.device)
    blocks = []
    for start in range(0, length, _QUERY_BLOCK_TOKENS):
        rows = columns[start : start + _QUERY_BLOCK_TOKENS, None]
        reach = reach_L[start : start + _QUERY_BLOCK_TOKENS, None]
        seen = columns <= torch.maximum(rows, reach)
        if window is not None and window < length:
            near = columns > rows - window
            seen &= near if window_binds else near | (rows <= reach_L[0])
        part = query[:, :, start : start + _QUERY_BLOCK_TOKENS]
        blocks.append(masked(part, key, value, seen, scoring))
    return torch.cat(blocks, dim=2)

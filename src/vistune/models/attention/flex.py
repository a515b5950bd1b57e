"""Packed attention by FlexAttention, with a mask of blocks made from the samples' boundaries.

On CUDA it is compiled: any head width and cap that Triton takes. On a CPU it runs uncompiled and
forward only, as torch offers no backward pass there; that is for tests, not for use. The mask of
blocks is worked out from the boundaries alone: nothing of size T x T is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vistune import _compat
from vistune.models.attention.contract import Packing, RowMemo, Scoring

_BLOCK = 128


class Flex:
    """`torch.nn.attention.flex_attention`."""

    name = "flex"

    def __init__(self) -> None:
        self._masks: RowMemo[BlockMask] = RowMemo()
        self._compiled: Callable[..., Any] | None = None

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """See `Backend`."""
        kind = query_UHD.device.type
        if kind not in ("cuda", "cpu"):
            return f"tensors are on {kind}"
        if scoring.dropout > 0:
            return "weights are dropped"
        if kind == "cpu" and torch.is_grad_enabled() and query_UHD.requires_grad:
            return "torch has no backward pass of it on a CPU"
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
        num_queries, num_keys = query_UHD.shape[0], key_THD.shape[0]
        mask = self._masks.get(
            packing,
            scoring.window,
            make=lambda: block_mask(packing, num_queries, num_keys, window=scoring.window),
        )
        query, key, value = (x.transpose(0, 1)[None] for x in (query_UHD, key_THD, value_THD))
        out = self._run(query)(
            query,
            key,
            value,
            score_mod=None if scoring.softcap is None else _capped(scoring.softcap),
            block_mask=mask,
            scale=scoring.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(out, Tensor)
        return out.squeeze(0).transpose(0, 1)

    def _run(self, query: Tensor) -> Callable[..., Any]:
        if query.device.type == "cpu":
            return flex_attention
        if self._compiled is None:
            self._compiled = _compat.compiled_flex_attention()
        return self._compiled


def _capped(cap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score


def block_mask(
    packing: Packing, num_queries: int, num_keys: int, *, window: int | None
) -> BlockMask:
    """Works out which blocks of scores a packed row needs, without waiting for the device.

    Args:
        packing: The row.
        num_queries: Queries in the row.
        num_keys: Keys in the row.
        window: Positions a token sees, itself included.

    Returns:
        A mask of blocks of 128 x 128: those between samples are left out, those inside one are
        whole, and only blocks across an edge are masked position by position.
    """
    cu = packing.cu_seqlens
    key_place = torch.arange(_round_up(num_keys), device=cu.device).clamp_(max=num_keys - 1)
    key_sample = torch.searchsorted(cu[1:], key_place, right=True)
    if packing.cu_queries is None:
        place, sample = key_place, key_sample
    else:
        ends = packing.cu_queries[1:]
        query = torch.arange(_round_up(num_queries), device=cu.device).clamp_(max=num_queries - 1)
        sample = torch.searchsorted(ends, query, right=True)
        place = cu[1:][sample] - (ends[sample] - query)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same = sample[q] == key_sample[kv]
        if packing.causal:
            same = same & (kv <= place[q])
        if window is not None:
            same = same & (place[q] - kv < window)
        return same

    # First and last of each block; both samples and places only ever rise.
    q_sample, q_place = _ends(sample), _ends(place)
    k_sample, k_place = _ends(key_sample), _ends(key_place)
    some = (k_sample[0] <= q_sample[1][:, None]) & (k_sample[1] >= q_sample[0][:, None])
    all_ = (k_sample[0] == q_sample[1][:, None]) & (k_sample[1] == q_sample[0][:, None])
    if packing.causal:
        some &= k_place[0] <= q_place[1][:, None]
        all_ &= k_place[1] <= q_place[0][:, None]
    if window is not None:
        some &= q_place[0][:, None] - k_place[1] < window
        all_ &= q_place[1][:, None] - k_place[0] < window
    all_ &= some
    if num_queries % _BLOCK:
        all_[-1] = False
    if num_keys % _BLOCK:
        all_[:, -1] = False
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~all_),
        *_ordered(all_),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )


def _round_up(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = values.view(-1, _BLOCK)
    return blocks[:, 0], blocks[:, -1]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number and places of the blocks of each row of blocks: int32 [1, 1, Q], [1, 1, Q, K]."""
    counts = blocks.sum(-1, dtype=torch.int32)
    places = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], places.to(torch.int32)[None, None]

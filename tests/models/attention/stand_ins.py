"""Attention written out in full, and stand-ins for packages that cannot run where tests run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistune.models.attention import Packing, Scoring


def written_out(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scoring: Scoring
) -> Tensor:
    """The same by one large mask: [U, H, D]."""
    keys = packing.cu_seqlens
    queries = keys if packing.cu_queries is None else packing.cu_queries
    key_sample, key_place = _places(keys, keys)
    sample, place = _places(queries, keys)
    seen = sample[:, None] == key_sample
    if packing.causal:
        seen &= key_place <= place[:, None]
    if scoring.window is not None:
        seen &= place[:, None] - key_place < scoring.window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = torch.einsum("uhd,thd->hut", query, key) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hut,thd->uhd", weights, value)


def _places(edges: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sample of each position and its place from the sample's start, aligned to the end."""
    lengths, whole = edges.diff(), keys.diff()
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(int(edges[-1])) - edges[:-1][sample] + (whole - lengths)[sample]
    return sample, place


class FakeNpu:
    """`torch_npu` as far as it is called: checks the arguments and computes what they mean."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def npu_fusion_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        *,
        atten_mask: Tensor | None = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        actual_seq_qlen: list[int] | None = None,
        actual_seq_kvlen: list[int] | None = None,
        sparse_mode: int = 0,
    ) -> tuple[Tensor, ...]:
        assert input_layout == "TND" and head_num == query.shape[1] and keep_prob == 1.0
        for ends, tensor in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
            assert ends is not None and all(type(end) is int for end in ends)
            assert ends == sorted(ends) and ends[-1] == tensor.shape[0]
        causal = sparse_mode in (3, 4)
        if causal:
            assert atten_mask is not None and atten_mask.dtype is torch.bool
            assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool())
        else:
            assert atten_mask is None and sparse_mode == 0
        window = None
        if sparse_mode == 4:
            assert next_tockens == 0
            window = pre_tockens + 1
        self.calls.append({"sparse_mode": sparse_mode, "ends": tuple(actual_seq_kvlen or ())})
        keys, queries = (
            torch.tensor([0, *(ends or [])]) for ends in (actual_seq_kvlen, actual_seq_qlen)
        )
        packing = Packing(keys, int(keys.diff().max()), causal, cu_queries=queries)
        out = written_out(query, key, value, packing, Scoring(scale, window))
        nothing = out.new_empty(0)
        return out, nothing, nothing, nothing


def fake_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func`: causal masks are aligned to the end."""
    assert cu_seqlens_q.dtype is torch.int32 and cu_seqlens_k.dtype is torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max()) and dropout_p == 0.0
    window = None
    if window_size != (-1, -1):
        assert causal and window_size[1] == 0
        window = window_size[0] + 1
    packing = Packing(cu_seqlens_k, max_seqlen_k, causal, cu_queries=cu_seqlens_q)
    scoring = Scoring(softmax_scale, window, softcap or None)
    return written_out(q, k, v, packing, scoring)

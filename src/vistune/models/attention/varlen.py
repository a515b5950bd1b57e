"""Packed attention by torch's own variable-length flash kernel: CUDA (and ROCm), 16-bit numbers."""

from __future__ import annotations

from torch import Tensor

from vistune import _compat
from vistune.models.attention.contract import HALF, Packing, Scoring


class Varlen:
    """`torch.nn.attention.varlen`."""

    name = "varlen"

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """See `Backend`."""
        width = query_UHD.shape[-1]
        if not query_UHD.is_cuda:
            return f"tensors are on {query_UHD.device.type}"
        if value_THD.dtype not in HALF:
            return f"numbers are {value_THD.dtype}"
        if scoring.softcap is not None:
            return "scores are capped"
        if scoring.dropout > 0:
            return "weights are dropped"
        if width != value_THD.shape[-1] or width % 8 or width > 256:
            return f"heads are {width} wide"
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
        return _compat.varlen_attention(
            query_UHD,
            key_THD,
            value_THD,
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            scale=scoring.scale,
            window=scoring.window,
            causal=packing.causal,
            cu_queries=packing.cu_queries,
            max_queries=packing.max_queries,
        )

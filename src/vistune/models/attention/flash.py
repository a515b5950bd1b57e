"""Packed attention by the package flash-attn, where it is installed; no build of it is needed.

Not run in continuous tests: they check the call's arguments with a stand-in that computes the
result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from vistune.device.attention import flash_version
from vistune.errors import MissingExtraError
from vistune.models.attention.contract import HALF, Packing, Scoring


class FlashAttention:
    """`flash_attn_varlen_func` of FlashAttention 3 (`flash_attn_interface`) or 2 (`flash_attn`).

    Args:
        kernel: The function; that of the package installed when left out.
    """

    name = "flash_attn"

    def __init__(self, kernel: Callable[..., Any] | None = None) -> None:
        self._kernel = _installed() if kernel is None else kernel
        self._takes_dropout = "dropout_p" in inspect.signature(self._kernel).parameters

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """See `Backend`."""
        width = query_UHD.shape[-1]
        if value_THD.dtype not in HALF:
            return f"numbers are {value_THD.dtype}"
        if scoring.dropout > 0 and not self._takes_dropout:
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
        """See `Backend`. With fewer queries than keys the kernel aligns them to the end."""
        extra: dict[str, Any] = {}
        if scoring.dropout > 0:
            extra["dropout_p"] = scoring.dropout
        if scoring.softcap is not None:
            extra["softcap"] = scoring.softcap
        cu_queries, max_queries = packing.cu_queries, packing.max_queries
        out = self._kernel(
            query_UHD,
            key_THD,
            value_THD,
            cu_seqlens_q=packing.cu_seqlens if cu_queries is None else cu_queries,
            cu_seqlens_k=packing.cu_seqlens,
            max_seqlen_q=packing.max_seqlen if max_queries is None else max_queries,
            max_seqlen_k=packing.max_seqlen,
            softmax_scale=scoring.scale,
            causal=packing.causal,
            window_size=(-1, -1) if scoring.window is None else (scoring.window - 1, 0),
            **extra,
        )
        # Some versions return the sums of the softmax beside the result.
        found = out[0] if isinstance(out, tuple) else out
        assert isinstance(found, Tensor)
        return found


def _installed() -> Callable[..., Any]:
    version = flash_version()
    if version is None:
        raise MissingExtraError.of(
            "flash-attn", extra="flash", purpose="train.attention=flash_attn"
        )
    module = import_module("flash_attn_interface" if version == 3 else "flash_attn")
    kernel: Callable[..., Any] = module.flash_attn_varlen_func
    return kernel

"""Packed attention on Ascend devices: `torch_npu.npu_fusion_attention` with boundaries as lists.

Written against the documented interface and never run on the device here: tests check the call's
arguments with a stand-in that computes the result.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vistune.errors import MissingExtraError, ModelError
from vistune.models.attention.contract import Packing, RowMemo, Scoring

_MASK_SIDE = 2048
"""The compressed causal mask that the operator's sparse modes 3 and 4 read has this side."""
_CAUSAL_AT_END, _BAND, _PLAIN = 3, 4, 0
_MOST_SAMPLES = 1024


class NpuFusion:
    """The fused attention of torch_npu, layout `TND`.

    Args:
        module: The package `torch_npu`; imported when left out.

    Source:
        torch_npu 2.13, `npu_fusion_attention`: cumulative ends in `actual_seq_qlen` and
        `actual_seq_kvlen` (samples without a query allowed), sparse modes 3 (causal, aligned to the
        end) and 4 (a band), `atten_mask` true where a score is left out, at most 1,024 samples.
    """

    name = "npu"

    def __init__(self, module: Any = None) -> None:
        self._npu = _installed() if module is None else module
        self._ends: RowMemo[tuple[list[int], list[int]]] = RowMemo()
        self._masks: dict[torch.device, Tensor] = {}

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """See `Backend`."""
        width = query_UHD.shape[-1]
        if scoring.softcap is not None:
            return "scores are capped"
        if width != value_THD.shape[-1] or width % 16 or width > 256:
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
        # The operator takes boundaries as numbers of the host: one wait for each row.
        queries, keys = self._ends.get(packing, make=lambda: _host_ends(packing))
        if len(keys) > _MOST_SAMPLES:
            raise ModelError(
                "the device's fused attention takes rows of few enough samples",
                where="batch.max_tokens",
                got=f"{len(keys)} samples in a row",
                expected=f"at most {_MOST_SAMPLES}",
                fix="lower batch.max_tokens, or set train.attention=sdpa",
            )
        width = query_UHD.shape[-1]
        extra: dict[str, Any] = {"sparse_mode": _PLAIN}
        if packing.causal:
            extra = {"sparse_mode": _CAUSAL_AT_END, "atten_mask": self._mask(query_UHD.device)}
        if scoring.window is not None:
            extra |= {
                "sparse_mode": _BAND,
                "pre_tockens": scoring.window - 1,
                "next_tockens": 0,
                "atten_mask": self._mask(query_UHD.device),
            }
        out = self._npu.npu_fusion_attention(
            query_UHD,
            key_THD,
            value_THD,
            query_UHD.shape[1],
            "TND",
            scale=width**-0.5 if scoring.scale is None else scoring.scale,
            keep_prob=1.0 - scoring.dropout,
            actual_seq_qlen=queries,
            actual_seq_kvlen=keys,
            **extra,
        )[0]
        assert isinstance(out, Tensor)
        return out

    def _mask(self, device: torch.device) -> Tensor:
        if device not in self._masks:
            whole = torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool, device=device)
            self._masks[device] = whole.triu(1)
        return self._masks[device]


def _host_ends(packing: Packing) -> tuple[list[int], list[int]]:
    keys: list[int] = packing.cu_seqlens[1:].tolist()
    if packing.cu_queries is None:
        return keys, keys
    queries: list[int] = packing.cu_queries[1:].tolist()
    return queries, keys


def _installed() -> Any:
    try:
        return import_module("torch_npu")
    except ImportError as error:
        raise MissingExtraError.of(
            "torch_npu", extra="npu", purpose="train.attention=npu"
        ) from error

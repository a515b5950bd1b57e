"""Packed attention by cuDNN's kernels for ragged rows, through the package nvidia-cudnn-frontend.

On Hopper they need about two thirds of the time of torch's varlen kernel, forward and backward,
take grouped key heads as they are, and read and write the merged projection's own layout. What they
are not used for here (windows, queries for the ends of samples only) goes to torch's kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vistune.errors import MissingExtraError
from vistune.models.attention.contract import Packing, RowMemo, Scoring
from vistune.models.attention.varlen import Varlen

_SAMPLES_STEP = 8
_SHORT, _SHORT_STEP, _LONG_STEP = 1024, 256, 1024
_TOKENS_STEP = 8192
_INT32 = 2**31


class Cudnn:
    """cuDNN's scaled-dot-product attention with ragged offsets.

    A kernel's plan takes 50 ms to build (a second the first time), so it is built for sizes rounded
    up and rows of similar size share one; what lies beyond a row costs next to nothing.
    """

    name = "cudnn"

    def __init__(self) -> None:
        if find_spec("cudnn") is None:
            raise MissingExtraError.of("cudnn", extra="cudnn", purpose="train.attention=cudnn")
        self._varlen = Varlen()
        self._rows: RowMemo[_Row] = RowMemo()
        self._plans: dict[_Sizes, _Plans] = {}
        self._handles: dict[torch.device, Any] = {}

    def refusal(self, query_UHD: Tensor, value_THD: Tensor, scoring: Scoring) -> str | None:
        """See `Backend`. Checked with heads of 64 to 256."""
        return self._varlen.refusal(query_UHD, value_THD, scoring)

    def attend(
        self,
        query_UHD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        packing: Packing,
        scoring: Scoring,
    ) -> Tensor:
        """See `Backend`."""
        row_width = sum(t.shape[1] for t in (query_UHD, key_THD, value_THD)) * query_UHD.shape[2]
        plain = packing.causal and packing.cu_queries is None and scoring.window is None
        if not plain or query_UHD.shape[0] * row_width >= _INT32:
            return self._varlen.attend(query_UHD, key_THD, value_THD, packing, scoring)
        joined = all(
            t.stride() == (row_width, t.shape[2], 1) for t in (query_UHD, key_THD, value_THD)
        )
        if not joined:
            query_UHD, key_THD, value_THD = (
                t.contiguous() for t in (query_UHD, key_THD, value_THD)
            )
        width = query_UHD.shape[2]
        scale = width**-0.5 if scoring.scale is None else scoring.scale
        heads = (query_UHD.shape[1], key_THD.shape[1])
        sizes = _Sizes.of(packing, query_UHD, heads=heads, joined=joined, scale=scale)
        row = self._rows.get(packing, sizes, make=lambda: _Row.of(packing, sizes))
        out: Tensor = _Attend.apply(query_UHD, key_THD, value_THD, self._plan(sizes), row)  # type: ignore[no-untyped-call]
        return out

    def _plan(self, sizes: _Sizes) -> _Plans:
        if sizes not in self._plans:
            handle = self._handles.get(sizes.device)
            if handle is None:
                with torch.cuda.device(sizes.device):
                    handle = self._handles[sizes.device] = import_module("cudnn").create_handle()
            self._plans[sizes] = _Plans(sizes, handle)
        return self._plans[sizes]


@dataclass(frozen=True)
class _Sizes:
    """What a plan is built for.

    Args:
        device: Where it runs.
        dtype: Of queries, keys and values.
        num_samples: Most samples of a row.
        max_seqlen: Longest sample.
        num_tokens: Most tokens of a row.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        width: Of a head.
        joined: Queries, keys and values lie side by side, and so shall their gradients.
        scale: Factor on the scores.
    """

    device: torch.device
    dtype: torch.dtype
    num_samples: int
    max_seqlen: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    width: int
    joined: bool
    scale: float

    @classmethod
    def of(
        cls, packing: Packing, query_THD: Tensor, *, heads: tuple[int, int], joined: bool,
        scale: float,
    ) -> _Sizes:  # fmt: skip
        longest = packing.max_seqlen
        return cls(
            query_THD.device,
            query_THD.dtype,
            _up(packing.cu_seqlens.shape[0] - 1, _SAMPLES_STEP),
            _up(longest, _SHORT_STEP if longest <= _SHORT else _LONG_STEP),
            _up(query_THD.shape[0], _TOKENS_STEP),
            *heads,
            query_THD.shape[2],
            joined,
            scale,
        )

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one token's query to the next one's, and the same for keys and values."""
        if self.joined:
            both = (self.num_heads + 2 * self.num_kv_heads) * self.width
            return both, both
        return self.num_heads * self.width, self.num_kv_heads * self.width


def _up(value: int, step: int) -> int:
    return math.ceil(value / step) * step


class _Uid(IntEnum):
    """Names of a plan's tensors."""

    Q, K, V, O, STATS, D_O, D_Q, D_K, D_V = range(1, 10)  # noqa: E741
    AT_Q, AT_KV, AT_O, AT_STATS, LENGTHS_Q, LENGTHS_KV = range(10, 16)


@dataclass(frozen=True)
class _Row:
    """Where a row's samples start in each tensor, and how long they are; empty ones fill it up."""

    tensors: dict[int, Tensor]

    @classmethod
    def of(cls, packing: Packing, sizes: _Sizes) -> _Row:
        edges = packing.cu_seqlens
        missing = sizes.num_samples + 1 - edges.shape[0]
        edges = torch.cat([edges, edges[-1:].expand(missing)]).to(torch.int32)
        lengths = edges.diff()
        query, key = sizes.strides
        return cls(
            {
                _Uid.AT_Q: edges * query,
                _Uid.AT_KV: edges * key,
                _Uid.AT_O: edges * (sizes.num_heads * sizes.width),
                _Uid.AT_STATS: edges * sizes.num_heads,
                _Uid.LENGTHS_Q: lengths,
                _Uid.LENGTHS_KV: lengths,
            }
        )


class _Plans:
    """The kernels for one set of sizes, forward and backward."""

    def __init__(self, sizes: _Sizes, handle: Any) -> None:
        self.sizes, self._handle = sizes, handle
        self._cudnn: Any = import_module("cudnn")
        self._forward = _Graph(sizes, handle).forward()
        self._backward: Any = None

    def run(self, tensors: dict[int, Tensor], *, backward: bool) -> None:
        """Runs a kernel on the current stream."""
        if backward and self._backward is None:
            self._backward = _Graph(self.sizes, self._handle).backward()
        graph = self._backward if backward else self._forward
        device = self.sizes.device
        num_bytes = max(1, graph.get_workspace_size())
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        self._cudnn.set_stream(handle=self._handle, stream=stream)
        pointers = {int(uid): tensor.data_ptr() for uid, tensor in tensors.items()}
        graph.execute(pointers, workspace.data_ptr(), handle=self._handle)


class _Graph:
    """Describes a kernel to cuDNN and has its plan built."""

    def __init__(self, sizes: _Sizes, handle: Any) -> None:
        self._sizes, self._cudnn = sizes, import_module("cudnn")
        types: Any = self._cudnn.data_type
        self._types = types
        self._lists: dict[_Uid, Any] = {}
        self._graph = self._cudnn.pygraph(
            io_data_type=types.BFLOAT16 if sizes.dtype is torch.bfloat16 else types.HALF,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle,
        )

    def forward(self) -> Any:
        """Returns the forward kernel."""
        shared = self._shared()
        out, stats = self._graph.sdpa(name="attend", generate_stats=True, **shared)
        self._output(out, _Uid.O, _Uid.AT_O)
        self._output(stats, _Uid.STATS, _Uid.AT_STATS)
        return self._built()

    def backward(self) -> Any:
        """Returns the backward kernel."""
        grads = self._graph.sdpa_backward(
            name="attend_backward",
            o=self._input(_Uid.O, _Uid.AT_O),
            dO=self._input(_Uid.D_O, _Uid.AT_O),
            stats=self._input(_Uid.STATS, _Uid.AT_STATS),
            max_total_seq_len_q=self._sizes.num_tokens,
            max_total_seq_len_kv=self._sizes.num_tokens,
            **self._shared(),
        )
        places = ((_Uid.D_Q, _Uid.AT_Q), (_Uid.D_K, _Uid.AT_KV), (_Uid.D_V, _Uid.AT_KV))
        for tensor, (uid, at) in zip(grads, places, strict=True):
            self._output(tensor, uid, at)
        return self._built()

    def _built(self) -> Any:
        self._graph.validate()
        self._graph.build_operation_graph()
        self._graph.create_execution_plans([self._cudnn.heur_mode.A])
        self._graph.check_support()
        self._graph.build_plans()
        return self._graph

    def _shared(self) -> dict[str, Any]:
        count = self._sizes.num_samples
        return {
            "q": self._input(_Uid.Q, _Uid.AT_Q),
            "k": self._input(_Uid.K, _Uid.AT_KV),
            "v": self._input(_Uid.V, _Uid.AT_KV),
            "attn_scale": self._sizes.scale,
            "use_causal_mask": True,
            "use_padding_mask": True,
            "seq_len_q": self._list(_Uid.LENGTHS_Q, count),
            "seq_len_kv": self._list(_Uid.LENGTHS_KV, count),
        }

    def _list(self, uid: _Uid, count: int) -> Any:
        """Declares a list of int32, once a graph."""
        if uid not in self._lists:
            self._lists[uid] = self._graph.tensor(
                name=uid.name, uid=int(uid), dim=[count, 1, 1, 1], stride=[1, 1, 1, 1],
                data_type=self._types.INT32,
            )  # fmt: skip
        return self._lists[uid]

    def _layout(self, uid: _Uid) -> tuple[list[int], list[int]]:
        """Returns size and strides of a tensor as [samples, heads, tokens, width]."""
        sizes = self._sizes
        query, key = sizes.strides
        is_query = uid in (_Uid.Q, _Uid.O, _Uid.STATS, _Uid.D_O, _Uid.D_Q)
        heads = sizes.num_heads if is_query else sizes.num_kv_heads
        width, token = sizes.width, query if is_query else key
        if uid in (_Uid.O, _Uid.D_O):
            token = heads * width
        if uid is _Uid.STATS:
            width, token = 1, heads
        size = [sizes.num_samples, heads, sizes.max_seqlen, width]
        return size, [sizes.max_seqlen * token, width, token, 1]

    def _input(self, uid: _Uid, at: _Uid) -> Any:
        size, strides = self._layout(uid)
        kind = {"data_type": self._types.FLOAT} if uid is _Uid.STATS else {}
        found = self._graph.tensor(name=uid.name, uid=int(uid), dim=size, stride=strides, **kind)
        found.set_ragged_offset(self._list(at, self._sizes.num_samples + 1))
        return found

    def _output(self, tensor: Any, uid: _Uid, at: _Uid) -> None:
        size, strides = self._layout(uid)
        tensor.set_output(True).set_uid(int(uid)).set_dim(size).set_stride(strides)
        if uid is _Uid.STATS:
            tensor.set_data_type(self._types.FLOAT)
        tensor.set_ragged_offset(self._list(at, self._sizes.num_samples + 1))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plans: _Plans, row: _Row
    ) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        stats = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        given = {_Uid.Q: query, _Uid.K: key, _Uid.V: value, _Uid.O: out, _Uid.STATS: stats}
        plans.run(row.tensors | given, backward=False)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.plans, ctx.row = plans, row
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, stats = ctx.saved_tensors
        grads: tuple[Tensor, ...]
        heads = [t.shape[1] for t in (query, key, value)]
        if ctx.plans.sizes.joined:
            both = query.new_empty(query.shape[0], sum(heads), query.shape[2])
            grads = torch.split(both, heads, dim=1)
        else:
            grads = tuple(torch.empty_like(t) for t in (query, key, value))
        given = {
            _Uid.Q: query, _Uid.K: key, _Uid.V: value, _Uid.O: out, _Uid.STATS: stats,
            _Uid.D_O: grad.contiguous(),
        }  # fmt: skip
        wanted = dict(zip((_Uid.D_Q, _Uid.D_K, _Uid.D_V), grads, strict=True))
        ctx.plans.run(ctx.row.tensors | given | wanted, backward=True)
        return (*grads, None, None)

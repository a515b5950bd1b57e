"""The last decoder layer, computed only where it is read.

Above the last layer only hidden states that predict a target token are used, and most positions of
a vision-language row are image tokens. So keys and values are made for every position, everything
else from the first target of each sample on. It is the same function of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vistune.models.fused.layer import (
    Drops,
    FusedLayer,
    MlpSaved,
    PostSaved,
    mlp_backward,
    mlp_forward,
    normed_heads,
    normed_heads_backward_,
    project_onto,
    through_post,
)
from vistune.models.fused.projection import Lowrank, Projection
from vistune.models.fused.torch_ops import Operand

TailAttention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Differentiable attention of the last queries of each sample: q [U, Hq, w], k and v [T, Hk, w]."""


@dataclass
class TailLayer:
    """A fused layer whose query projection stands apart from its key and value projection.

    Args:
        layer: The layer; its `qkv` is not used.
        query: Query projection.
        key_value: Merged key and value projection.
    """

    layer: FusedLayer
    query: Projection
    key_value: Projection

    def draw(self) -> Drops:
        """Draws what a call drops: before query, key and value, `out`, `gate_up` and `down`."""
        layer = self.layer
        return [
            p.draw() for p in (self.query, self.key_value, layer.out, layer.gate_up, layer.down)
        ]

    def parameters(self) -> list[Tensor]:
        """Returns what trains, in the order the backward pass gives gradients."""
        inputs = self.layer.attention_parameters(self.query, self.key_value)
        return [*inputs, *self.layer.mlp_parameters()]


@dataclass
class _Saved:
    rstd_T: Tensor
    rstd_U: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    lowrank: tuple[Lowrank | None, Lowrank | None, Lowrank | None]
    mlp: MlpSaved
    raw: tuple[Tensor, Tensor]
    post: PostSaved | None = None


def _forward(
    tail: TailLayer,
    x_TD: Tensor,
    index_U: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention: TailAttention,
    ops: ModuleType,
    drops: Drops,
) -> tuple[Tensor, _Saved]:
    layer = tail.layer
    drop_q, drop_kv, drop_out, *drops_mlp = drops
    n_T, rstd_T = layer.norm1.forward(x_TD, ops, reader=tail.key_value)
    kv, low_kv = tail.key_value.forward(n_T, ops, drop=drop_kv)
    del n_T
    x_UD = x_TD[index_U]
    n_U, rstd_U = layer.norm1.forward(x_UD, ops, reader=tail.query)
    q_flat, low_q = tail.query.forward(n_U, ops, drop=drop_q)
    raw_kv = kv.view(kv.shape[0], -1, layer.head_width)
    raw_q = q_flat.view(q_flat.shape[0], -1, layer.head_width)
    kv = normed_heads(layer.head_norms, raw_kv, ops, num_heads=0, num_kv_heads=layer.num_kv_heads)
    q = normed_heads(layer.head_norms, raw_q, ops, num_heads=layer.num_heads, num_kv_heads=0)
    bias_HK = layer.key_bias()
    ops.rotate_(kv, cos, sin, num_heads=layer.num_kv_heads, inverse=False, key_bias_HK=bias_HK)
    ops.rotate_(q, cos[index_U], sin[index_U], num_heads=layer.num_heads, inverse=False)
    k, v = torch.split(kv, [layer.num_kv_heads, layer.num_kv_heads], dim=1)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.enable_grad():
        attended = attention(q, k, v)
    flat = attended.detach().reshape(q.shape[0], -1)
    h_UD, low_out, post = project_onto(layer.out, Operand(flat), x_UD, layer.post1, ops, drop_out)
    y_UD, mlp = mlp_forward(layer, h_UD, ops, drops_mlp)
    lowrank = (low_q, low_kv, low_out)
    saved = _Saved(rstd_T, rstd_U, q, k, v, attended, lowrank, mlp, (raw_q, raw_kv), post)
    return y_UD, saved


def _backward(
    tail: TailLayer,
    grad_UD: Tensor,
    x_TD: Tensor,
    index_U: Tensor,
    cos: Tensor,
    sin: Tensor,
    saved: _Saved,
    ops: ModuleType,
) -> tuple[Tensor, list[Tensor]]:
    layer = tail.layer
    low_q, low_kv, low_out = saved.lowrank
    d_h, g_mlp = mlp_backward(layer, grad_UD, saved.mlp, ops)
    flat = saved.attended.detach().reshape(grad_UD.shape[0], -1)
    d_out, g_post = through_post(d_h, layer.post1, saved.post, ops)
    d_attended, inner = layer.out.backward(Operand(d_out), low_out, ops)
    g_out = layer.out.gradients(Operand(d_out), inner, flat, low_out, ops)
    d_q, d_k, d_v = torch.autograd.grad(
        saved.attended, (saved.q, saved.k, saved.v), d_attended.view_as(saved.attended)
    )
    d_q, d_kv = d_q.contiguous(), torch.cat([d_k, d_v], dim=1)
    ops.rotate_(d_q, cos[index_U], sin[index_U], num_heads=layer.num_heads, inverse=True)
    ops.rotate_(d_kv, cos, sin, num_heads=layer.num_kv_heads, inverse=True)
    raw_q, raw_kv = saved.raw
    g_heads = normed_heads_backward_(
        layer.head_norms, d_q, raw_q, ops, num_heads=layer.num_heads, num_kv_heads=0
    )[:1]
    g_heads += normed_heads_backward_(
        layer.head_norms, d_kv, raw_kv, ops, num_heads=0, num_kv_heads=layer.num_kv_heads
    )[1:]
    of_query, of_kv = Operand(d_q.flatten(1)), Operand(d_kv.flatten(1))
    d_n_U, inner = tail.query.backward(of_query, low_q, ops)
    at_U = layer.norm1.backward(
        d_n_U, x_TD[index_U], saved.rstd_U, ops, residual_TD=d_h, again=tail.query.reads_again
    )
    g_q = tail.query.gradients(of_query, inner, at_U.output_TD, low_q, ops)
    residual_TD = torch.zeros_like(x_TD).index_copy_(0, index_U, at_U.x_TD)
    d_n_T, inner = tail.key_value.backward(of_kv, low_kv, ops)
    at_T = layer.norm1.backward(
        d_n_T, x_TD, saved.rstd_T, ops,
        residual_TD=residual_TD, again=tail.key_value.reads_again,
    )  # fmt: skip
    g_kv = tail.key_value.gradients(of_kv, inner, at_T.output_TD, low_kv, ops)
    g_norm = [a.add_(b) for a, b in zip(at_T.weight, at_U.weight, strict=True)]
    return at_T.x_TD, [*g_norm, *g_heads, *g_post, *g_q, *g_kv, *g_out, *g_mlp]


class _TailFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tail: TailLayer,
        attention: TailAttention,
        ops: ModuleType,
        x_TD: Tensor,
        index_U: Tensor,
        cos: Tensor,
        sin: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        drops = tail.draw()
        y_UD, ctx.saved = _forward(tail, x_TD, index_U, cos, sin, attention, ops, drops)
        ctx.tail, ctx.ops = tail, ops
        ctx.save_for_backward(x_TD, index_U, cos, sin)
        return y_UD

    @staticmethod
    def backward(ctx: Any, grad_UD: Tensor) -> tuple[Any, ...]:
        saved, ctx.saved = ctx.saved, None
        x_TD, index_U, cos, sin = ctx.saved_tensors
        d_x, grads = _backward(
            ctx.tail, grad_UD.contiguous(), x_TD, index_U, cos, sin, saved, ctx.ops
        )
        return (None, None, None, d_x, None, None, None, *grads)


def run_tail(
    tail: TailLayer,
    x_TD: Tensor,
    index_U: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    attention: TailAttention,
    ops: ModuleType,
) -> Tensor:
    """Runs the last layer for the positions `index_U` of a packed row.

    Args:
        tail: The layer.
        x_TD: Its input at every position.
        index_U: int64 [U]; for each sample a run of positions up to its end.
        cos_TK: Rotary table at every position.
        sin_TK: Rotary table at every position.
        attention: Attention of those positions over every position of their sample up to them.
        ops: `torch_ops` or `triton_ops`.

    Returns:
        [U, D].
    """
    out: Tensor = _TailFunction.apply(  # type: ignore[no-untyped-call]
        tail, attention, ops, x_TD, index_U, cos_TK, sin_TK, *tail.parameters()
    )
    return out

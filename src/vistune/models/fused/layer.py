"""One decoder layer (pre-norm attention and gated MLP) with hand-written forward and backward.

It stands for the layers of Llama, Mistral, Qwen2, Qwen3 and Gemma whose base weights are frozen,
with or without LoRA. It is not a module: the parameters stay where transformers put them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vistune.models.fused.projection import Projection
from vistune.models.fused.torch_ops import Activation, Operand

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Differentiable attention over packed rows: q [T, Hq, w], k and v [T, Hk, w] -> [T, Hq, w]."""


@dataclass
class FusedLayer:
    """The weights and shape of one layer.

    Args:
        qkv: Merged query, key and value projection.
        out: Attention output projection.
        gate_up: Merged gate and up projection.
        down: Output projection of the MLP.
        norm1_D: Weight of the norm before attention.
        norm2_D: Weight of the norm before the MLP.
        eps: Epsilon of both norms.
        unit_offset: True where norm weights are stored minus one.
        activation: Of the gate.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_width: Width of a head.
    """

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm1_D: Tensor
    norm2_D: Tensor
    eps: float
    unit_offset: bool
    activation: Activation
    num_heads: int
    num_kv_heads: int
    head_width: int

    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """Returns the four projections in the order their adapters are passed to autograd."""
        return self.qkv, self.out, self.gate_up, self.down

    def adapter_parameters(self) -> list[Tensor]:
        """Returns A and B of every adapter, in a fixed order."""
        return [t for p in self.projections() for a in p.adapters for t in (a.down_RI, a.up_OR)]


@dataclass
class MlpSaved:
    """What the backward pass of a layer's second half reads."""

    h_TD: Tensor
    rstd_T: Tensor
    gate_up_TF: Tensor
    lowrank: tuple[Tensor | None, Tensor | None]


@dataclass
class _Saved:
    x_TD: Tensor
    rstd_T: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    lowrank: tuple[Tensor | None, Tensor | None]
    mlp: MlpSaved


def wants(projection: Projection) -> dict[str, bool]:
    """Returns in which forms a projection reads its input."""
    return {"quantize": projection.is_fp8, "keep": projection.reads_plain}


def mlp_forward(layer: FusedLayer, h_TD: Tensor, ops: ModuleType) -> tuple[Tensor, MlpSaved]:
    """Second half of a layer: h + MLP(norm(h))."""
    n2, rstd = ops.rms_norm(
        h_TD, layer.norm2_D, eps=layer.eps, unit_offset=layer.unit_offset, **wants(layer.gate_up)
    )
    gate_up, low_gate_up = layer.gate_up.forward(n2, ops)
    del n2
    active = ops.glu(gate_up, activation=layer.activation, **wants(layer.down))
    y, low_down = layer.down.forward(active, ops, residual_TO=h_TD)
    return y, MlpSaved(h_TD, rstd, gate_up, (low_gate_up, low_down))


def mlp_backward(
    layer: FusedLayer, grad_TD: Tensor, saved: MlpSaved, ops: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `mlp_forward`: of h, and of the adapters of gate_up and down."""
    low_gate_up, low_down = saved.lowrank
    grad = Operand(grad_TD)
    d_active, inner = layer.down.backward(grad, ops)
    d_gate_up, active = ops.glu_backward_(
        d_active, saved.gate_up_TF, activation=layer.activation,
        column_scale_F=layer.gate_up.scale_O, keep=layer.gate_up.reads_plain,
        again=bool(layer.down.adapters),
    )  # fmt: skip
    del d_active
    g_down = layer.down.adapter_gradients(grad, inner, active, low_down)
    del active
    d_n2, inner = layer.gate_up.backward(d_gate_up, ops)
    d_h, n2 = ops.rms_norm_backward(
        d_n2, saved.h_TD, saved.rstd_T, layer.norm2_D, grad_TD,
        unit_offset=layer.unit_offset, again=bool(layer.gate_up.adapters),
    )  # fmt: skip
    g_gate_up = layer.gate_up.adapter_gradients(d_gate_up, inner, n2, low_gate_up)
    return d_h, [*g_gate_up, *g_down]


def _forward(
    layer: FusedLayer, x_TD: Tensor, cos: Tensor, sin: Tensor, attention: Attention, ops: ModuleType
) -> tuple[Tensor, _Saved]:
    n1, rstd = ops.rms_norm(
        x_TD, layer.norm1_D, eps=layer.eps, unit_offset=layer.unit_offset, **wants(layer.qkv)
    )
    qkv, low_qkv = layer.qkv.forward(n1, ops)
    del n1
    heads = qkv.view(qkv.shape[0], -1, layer.head_width)
    turned = layer.num_heads + layer.num_kv_heads
    ops.rotate_(heads, cos, sin, num_heads=turned, inverse=False)
    sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
    q, k, v = (t.detach().requires_grad_() for t in torch.split(heads, sizes, dim=1))
    with torch.enable_grad():
        attended = attention(q, k, v)
    flat = attended.detach().reshape(qkv.shape[0], -1)
    h, low_out = layer.out.forward(Operand(flat), ops, residual_TO=x_TD)
    y, mlp = mlp_forward(layer, h, ops)
    return y, _Saved(x_TD, rstd, q, k, v, attended, (low_qkv, low_out), mlp)


def _backward(
    layer: FusedLayer, grad_TD: Tensor, cos: Tensor, sin: Tensor, saved: _Saved, ops: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    low_qkv, low_out = saved.lowrank
    d_h, g_mlp = mlp_backward(layer, grad_TD, saved.mlp, ops)
    flat = saved.attended.detach().reshape(grad_TD.shape[0], -1)
    d_attended, inner = layer.out.backward(Operand(d_h), ops)
    g_out = layer.out.adapter_gradients(Operand(d_h), inner, flat, low_out)
    d_q, d_k, d_v = torch.autograd.grad(
        saved.attended, (saved.q, saved.k, saved.v), d_attended.view_as(saved.attended)
    )
    d_qkv = Operand(ops.join_rotated(d_q, d_k, d_v, cos, sin).flatten(1))
    del d_q, d_k, d_v
    d_n1, inner = layer.qkv.backward(d_qkv, ops)
    d_x, n1 = ops.rms_norm_backward(
        d_n1, saved.x_TD, saved.rstd_T, layer.norm1_D, d_h,
        unit_offset=layer.unit_offset, again=bool(layer.qkv.adapters),
    )  # fmt: skip
    g_qkv = layer.qkv.adapter_gradients(d_qkv, inner, n1, low_qkv)
    return d_x, [*g_qkv, *g_out, *g_mlp]


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: FusedLayer,
        attention: Attention,
        ops: ModuleType,
        recompute: bool,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        *adapters: Tensor,
    ) -> Tensor:
        y, saved = _forward(layer, x_TD, cos, sin, attention, ops)
        ctx.layer, ctx.attention, ctx.ops = layer, attention, ops
        ctx.save_for_backward(x_TD, cos, sin)
        ctx.saved = None if recompute else saved
        return y

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        x_TD, cos, sin = ctx.saved_tensors
        saved = ctx.saved
        if saved is None:
            _, saved = _forward(ctx.layer, x_TD, cos, sin, ctx.attention, ctx.ops)
        ctx.saved = None
        d_x, grads = _backward(ctx.layer, grad_TD.contiguous(), cos, sin, saved, ctx.ops)
        return (None, None, None, None, d_x, None, None, *grads)


def run_layer(
    layer: FusedLayer,
    x_TD: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    attention: Attention,
    ops: ModuleType,
    recompute: bool = False,
) -> Tensor:
    """Runs one layer over a packed row.

    Args:
        layer: The layer.
        x_TD: [T, D].
        cos_TK: [T, head width], in the model's own form (both halves equal).
        sin_TK: [T, head width].
        attention: Differentiable attention that keeps the samples of the row apart.
        ops: `torch_ops` or `triton_ops`.
        recompute: Keep only the input and compute the layer again in the backward pass.

    Returns:
        [T, D].
    """
    out: Tensor = _LayerFunction.apply(  # type: ignore[no-untyped-call]
        layer, attention, ops, recompute, x_TD, cos_TK, sin_TK, *layer.adapter_parameters()
    )
    return out

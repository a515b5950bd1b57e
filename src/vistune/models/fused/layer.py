"""One decoder layer (attention and gated MLP between norms) with hand-written forward and backward.

It stands for the layers of Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma 2: frozen, with LoRA, or
trained whole. It is not a module: the parameters stay where transformers put them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vistune.models.attention import Scoring
from vistune.models.fused.projection import Drop, Lowrank, Projection, plain_form
from vistune.models.fused.torch_ops import Activation, Operand

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Differentiable attention over packed rows: q [T, Hq, w], k and v [T, Hk, w] -> [T, Hq, w]."""

Drops: TypeAlias = Sequence[Drop | None]
"""What one call drops of the inputs of a layer's adapters, in the order of its projections."""

PLAIN = Scoring()
"""Scores over the root of the head width, all of a sample seen, nothing capped."""


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm.

    Args:
        weight: [D]; for heads [head width].
        eps: Added to the mean square.
        unit_offset: True where the weight is stored minus one.
        parameter: The weight where it trains.
    """

    weight: Tensor
    eps: float
    unit_offset: bool
    parameter: Tensor | None = None

    def parameters(self) -> list[Tensor]:
        """Returns the weight if it trains."""
        return [] if self.parameter is None else [self.parameter]

    def forward(
        self, x_TD: Tensor, ops: ModuleType, *, reader: Projection | None = None
    ) -> tuple[Operand, Tensor]:
        """Returns the normalised rows in the forms `reader` wants, and what backward reads."""
        forms = {} if reader is None else wants(reader)
        found: tuple[Operand, Tensor] = ops.rms_norm(
            x_TD, self.weight, eps=self.eps, unit_offset=self.unit_offset, **forms
        )
        return found

    def backward(
        self,
        grad_TD: Tensor,
        x_TD: Tensor,
        rstd_T: Tensor,
        ops: ModuleType,
        *,
        residual_TD: Tensor | None = None,
        again: bool = False,
    ) -> NormGradient:
        """Returns the gradient of the input plus `residual_TD`, and what else was asked for."""
        dx, y, of_weight = ops.rms_norm_backward(
            grad_TD, x_TD, rstd_T, self.weight, residual_TD,
            unit_offset=self.unit_offset, again=again,
            weight_gradient=self.parameter is not None,
        )  # fmt: skip
        return NormGradient(dx, y, [] if of_weight is None else [of_weight])


class NormGradient(NamedTuple):
    """What a norm's backward pass gives.

    Args:
        x_TD: Gradient of its input.
        output_TD: The forward output once more, where asked for.
        weight: Gradient of its weight, where it trains.
    """

    x_TD: Tensor
    output_TD: Tensor | None
    weight: list[Tensor]


@dataclass(frozen=True)
class HeadNorms:
    """Norms of each query and key head before they are turned (Qwen3)."""

    query: Norm
    key: Norm

    def parameters(self) -> list[Tensor]:
        """Returns the weights that train: both or none."""
        return self.query.parameters() + self.key.parameters()


@dataclass
class FusedLayer:
    """The weights and shape of one layer.

    Args:
        qkv: Merged query, key and value projection.
        out: Attention output projection.
        gate_up: Merged gate and up projection.
        down: Output projection of the MLP.
        norm1: Before attention.
        norm2: Before the MLP.
        activation: Of the gate.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_width: Width of a head.
        head_norms: Of queries and keys, where there are.
        post1: Norm of attention's result before it is added, where there is one (Gemma 2).
        post2: The same of the MLP's result.
        scoring: How attention weighs, where it is not the plain way.
    """

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm1: Norm
    norm2: Norm
    activation: Activation
    num_heads: int
    num_kv_heads: int
    head_width: int
    head_norms: HeadNorms | None = None
    post1: Norm | None = None
    post2: Norm | None = None
    scoring: Scoring = PLAIN

    @property
    def heads(self) -> dict[str, int]:
        """Numbers of query heads and of key heads."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}

    def key_bias(self) -> Tensor | None:
        """Returns the bias that keys get as they are turned, [key heads, head width]."""
        if self.qkv.bias_O is None or self.qkv.held_back is None:
            return None
        start, stop = self.qkv.held_back
        return self.qkv.bias_O[start:stop].view(self.num_kv_heads, self.head_width)

    def draw(self) -> Drops:
        """Draws what a call drops: before `qkv`, `out`, `gate_up` and `down`."""
        return [p.draw() for p in (self.qkv, self.out, self.gate_up, self.down)]

    def parameters(self) -> list[Tensor]:
        """Returns what trains, in the order the backward pass gives gradients."""
        return [*self.attention_parameters(self.qkv), *self.mlp_parameters()]

    def attention_parameters(self, *inputs: Projection) -> list[Tensor]:
        """Returns what trains up to the output projection.

        Args:
            inputs: The projections that stand for `qkv`.
        """
        head_norms = self.head_norms.parameters() if self.head_norms is not None else []
        post = self.post1.parameters() if self.post1 is not None else []
        projections = [t for p in (*inputs, self.out) for t in p.parameters()]
        return [*self.norm1.parameters(), *head_norms, *post, *projections]

    def mlp_parameters(self) -> list[Tensor]:
        """Returns what trains of the MLP and its norms."""
        post = self.post2.parameters() if self.post2 is not None else []
        return [
            *self.norm2.parameters(),
            *post,
            *self.gate_up.parameters(),
            *self.down.parameters(),
        ]


@dataclass
class MlpSaved:
    """What the backward pass of a layer's second half reads."""

    h_TD: Tensor
    rstd_T: Tensor
    gate_up_TF: Tensor
    lowrank: tuple[Lowrank | None, Lowrank | None]
    post: PostSaved | None = None


@dataclass
class PostSaved:
    """What the backward pass of a norm after a projection reads."""

    x_TD: Tensor
    rstd_T: Tensor


@dataclass
class _Saved:
    x_TD: Tensor
    rstd_T: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    lowrank: tuple[Lowrank | None, Lowrank | None]
    mlp: MlpSaved
    raw_THK: Tensor | None = None
    post: PostSaved | None = None


def wants(projection: Projection) -> dict[str, Any]:
    """Returns in which forms a projection reads its input."""
    return {
        "quantize": projection.is_fp8,
        "keep": projection.reads_plain,
        "channels_C": projection.channels,
    }


def project_onto(
    projection: Projection,
    x: Operand,
    residual_TD: Tensor,
    post: Norm | None,
    ops: ModuleType,
    drop: Drop | None,
) -> tuple[Tensor, Lowrank | None, PostSaved | None]:
    """Adds a projection's result, or what a norm makes of it, to the residual stream."""
    if post is None:
        y, lowrank = projection.forward(x, ops, drop=drop, residual_TO=residual_TD)
        return y, lowrank, None
    y, lowrank = projection.forward(x, ops, drop=drop)
    normed, rstd = post.forward(y, ops)
    assert normed.plain is not None
    return residual_TD + normed.plain, lowrank, PostSaved(y, rstd)


def through_post(
    grad_TD: Tensor, post: Norm | None, saved: PostSaved | None, ops: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of a projection's result, and that of the norm behind it."""
    if post is None:
        return grad_TD, []
    assert saved is not None
    found = post.backward(grad_TD, saved.x_TD, saved.rstd_T, ops)
    return found.x_TD, found.weight


def mlp_forward(
    layer: FusedLayer, h_TD: Tensor, ops: ModuleType, drops: Drops
) -> tuple[Tensor, MlpSaved]:
    """Second half of a layer: h + MLP(norm(h)); `drops` are those of `gate_up` and `down`."""
    drop_gate_up, drop_down = drops
    n2, rstd = layer.norm2.forward(h_TD, ops, reader=layer.gate_up)
    gate_up, low_gate_up = layer.gate_up.forward(n2, ops, drop=drop_gate_up)
    del n2
    active = ops.glu(gate_up, activation=layer.activation, **wants(layer.down))
    y, low_down, post = project_onto(layer.down, active, h_TD, layer.post2, ops, drop_down)
    return y, MlpSaved(h_TD, rstd, gate_up, (low_gate_up, low_down), post)


def mlp_backward(
    layer: FusedLayer, grad_TD: Tensor, saved: MlpSaved, ops: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `mlp_forward`: of h, and of what trains in it."""
    low_gate_up, low_down = saved.lowrank
    d_y, g_post = through_post(grad_TD, layer.post2, saved.post, ops)
    grad = Operand(d_y)
    d_active, inner = layer.down.backward(grad, low_down, ops)
    d_gate_up, active = ops.glu_backward_(
        d_active, saved.gate_up_TF, activation=layer.activation,
        column_scale_F=layer.gate_up.row_scale, keep=layer.gate_up.reads_plain,
        again=layer.down.reads_again,
    )  # fmt: skip
    del d_active
    g_down = layer.down.gradients(grad, inner, active, low_down, ops)
    del active
    d_n2, inner = layer.gate_up.backward(d_gate_up, low_gate_up, ops)
    found = layer.norm2.backward(
        d_n2, saved.h_TD, saved.rstd_T, ops,
        residual_TD=grad_TD, again=layer.gate_up.reads_again,
    )  # fmt: skip
    g_gate_up = layer.gate_up.gradients(d_gate_up, inner, found.output_TD, low_gate_up, ops)
    return found.x_TD, [*found.weight, *g_post, *g_gate_up, *g_down]


def normed_heads(
    norms: HeadNorms | None, raw_THK: Tensor, ops: ModuleType, *, num_heads: int, num_kv_heads: int
) -> Tensor:
    """Applies the norms of query and key heads; `raw_THK` itself where there are none.

    Args:
        norms: The norms.
        raw_THK: Queries, then keys, then values.
        ops: The elementwise kernels.
        num_heads: Query heads of `raw_THK`.
        num_kv_heads: Key heads of `raw_THK`.
    """
    if norms is None:
        return raw_THK
    heads: Tensor = ops.head_norm(
        raw_THK, norms.query.weight, norms.key.weight, num_heads=num_heads,
        num_kv_heads=num_kv_heads, eps=norms.query.eps, unit_offset=norms.query.unit_offset,
    )  # fmt: skip
    return heads


def normed_heads_backward_(
    norms: HeadNorms | None,
    grad_THK: Tensor,
    raw_THK: Tensor | None,
    ops: ModuleType,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> list[Tensor]:
    """Turns the gradient of `normed_heads` into that of its input, in place.

    Returns:
        Gradients of the weights for query and key heads where they train.
    """
    if norms is None:
        return []
    assert raw_THK is not None
    found: tuple[Tensor, Tensor] | None = ops.head_norm_backward_(
        grad_THK, raw_THK, norms.query.weight, norms.key.weight, num_heads=num_heads,
        num_kv_heads=num_kv_heads, eps=norms.query.eps, unit_offset=norms.query.unit_offset,
        weight_gradient=bool(norms.parameters()),
    )  # fmt: skip
    return [] if found is None else [*found]


def _forward(
    layer: FusedLayer, x_TD: Tensor, cos: Tensor, sin: Tensor, attention: Attention,
    ops: ModuleType, drops: Drops = (None,) * 4,
) -> tuple[Tensor, _Saved]:  # fmt: skip
    drop_qkv, drop_out, *drops_mlp = drops
    n1, rstd = layer.norm1.forward(x_TD, ops, reader=layer.qkv)
    qkv, low_qkv = layer.qkv.forward(n1, ops, drop=drop_qkv)
    del n1
    raw = qkv.view(qkv.shape[0], -1, layer.head_width)
    heads = normed_heads(layer.head_norms, raw, ops, **layer.heads)
    turned = layer.num_heads + layer.num_kv_heads
    ops.rotate_(heads, cos, sin, num_heads=turned, inverse=False, key_bias_HK=layer.key_bias())
    sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
    q, k, v = (t.detach().requires_grad_() for t in torch.split(heads, sizes, dim=1))
    with torch.enable_grad():
        attended = attention(q, k, v)
    flat = attended.detach().reshape(qkv.shape[0], -1)
    h, low_out, post = project_onto(layer.out, Operand(flat), x_TD, layer.post1, ops, drop_out)
    y, mlp = mlp_forward(layer, h, ops, drops_mlp)
    lowrank = (low_qkv, low_out)
    kept = None if heads is raw else raw
    return y, _Saved(x_TD, rstd, q, k, v, attended, lowrank, mlp, kept, post)


def _backward(
    layer: FusedLayer, grad_TD: Tensor, cos: Tensor, sin: Tensor, saved: _Saved, ops: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    low_qkv, low_out = saved.lowrank
    d_h, g_mlp = mlp_backward(layer, grad_TD, saved.mlp, ops)
    flat = saved.attended.detach().reshape(grad_TD.shape[0], -1)
    d_out, g_post = through_post(d_h, layer.post1, saved.post, ops)
    d_attended, inner = layer.out.backward(Operand(d_out), low_out, ops)
    g_out = layer.out.gradients(Operand(d_out), inner, flat, low_out, ops)
    d_q, d_k, d_v = torch.autograd.grad(
        saved.attended, (saved.q, saved.k, saved.v), d_attended.view_as(saved.attended)
    )
    d_heads = _turned_back(layer, d_q, d_k, d_v, cos, sin, ops)
    del d_attended, d_q, d_k, d_v
    g_heads = normed_heads_backward_(layer.head_norms, d_heads, saved.raw_THK, ops, **layer.heads)
    d_qkv = Operand(d_heads.flatten(1))
    d_n1, inner = layer.qkv.backward(d_qkv, low_qkv, ops)
    found = layer.norm1.backward(
        d_n1, saved.x_TD, saved.rstd_T, ops, residual_TD=d_h, again=layer.qkv.reads_again
    )
    del d_n1
    g_qkv = layer.qkv.gradients(d_qkv, inner, found.output_TD, low_qkv, ops)
    return found.x_TD, [*found.weight, *g_heads, *g_post, *g_qkv, *g_out, *g_mlp]


def _turned_back(
    layer: FusedLayer, d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor,
    ops: ModuleType,
) -> Tensor:  # fmt: skip
    """Returns the gradients of query, key and value heads side by side, turned back."""
    joined = _as_one(d_q, d_k, d_v)
    if joined is None:
        found: Tensor = ops.join_rotated(d_q, d_k, d_v, cos, sin)
        return found
    turned = layer.num_heads + layer.num_kv_heads
    ops.rotate_(joined, cos, sin, num_heads=turned, inverse=True)
    return joined


def _as_one(*parts_THK: Tensor) -> Tensor | None:
    """Returns the tensor whose neighbouring heads the parts are, or None; it copies nothing."""
    first = parts_THK[0]
    width = first.shape[2]
    num_heads = sum(part.shape[1] for part in parts_THK)
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts_THK:
        if part.stride() != (num_heads * width, width, 1) or part.storage_offset() != at:
            return None
        if part.untyped_storage().data_ptr() != storage:
            return None
        at += part.shape[1] * width
    size = (first.shape[0], num_heads, width)
    return first.as_strided(size, (num_heads * width, width, 1))


def layer_with_inputs(
    layer: FusedLayer,
    x_TD: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    attention: Attention,
    ops: ModuleType,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a layer without a graph or dropout and also returns what its projections read.

    Returns:
        [T, D], and [T, in] of `qkv`, `out`, `gate_up` and `down`.
    """
    y_TD, saved = _forward(layer, x_TD, cos_TK, sin_TK, attention, ops)
    n1_TD = plain_form(layer.norm1.forward(x_TD, ops)[0])
    n2_TD = plain_form(layer.norm2.forward(saved.mlp.h_TD, ops)[0])
    active_TF = plain_form(ops.glu(saved.mlp.gate_up_TF, activation=layer.activation))
    attended_TI = saved.attended.detach().flatten(1)
    inputs = {"qkv": n1_TD, "out": attended_TI, "gate_up": n2_TD, "down": active_TF}
    return y_TD, inputs


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
        *trained: Tensor,
    ) -> Tensor:
        ctx.drops = layer.draw()
        y, saved = _forward(layer, x_TD, cos, sin, attention, ops, ctx.drops)
        ctx.layer, ctx.attention, ctx.ops = layer, attention, ops
        ctx.save_for_backward(x_TD, cos, sin)
        ctx.saved = None if recompute else saved
        return y

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        x_TD, cos, sin = ctx.saved_tensors
        saved = ctx.saved
        if saved is None:
            _, saved = _forward(ctx.layer, x_TD, cos, sin, ctx.attention, ctx.ops, ctx.drops)
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
        layer, attention, ops, recompute, x_TD, cos_TK, sin_TK, *layer.parameters()
    )
    return out

"""The elementwise steps of a decoder layer as Triton kernels; same names as `torch_ops`.

Memory-bound throughout: every kernel reads each input once and writes each output once. Arithmetic
is float32; what is stored rounds where the transformers layer rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vistune.models.fused.torch_ops import Activation, Operand


@triton.jit
def _store_fp8(v, out, scale, row, cols, mask, D):
    s = tl.maximum(tl.max(tl.abs(v), axis=0), 1e-12) / 448.0
    tl.store(scale + row, s)
    tl.store(out + row * D + cols, (v / s).to(tl.float8e4nv), mask=mask)


@triton.jit
def _rms_norm_kernel(
    x, weight, y, fp8, scale, rstd, stride_x, D, eps,
    OFFSET: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    v = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / D + eps)
    tl.store(rstd + row, r)
    hat = v * r
    if OFFSET:  # noqa: SIM108  (a constexpr branch)
        out = hat * (1.0 + w)
    else:
        out = hat.to(x.dtype.element_ty).to(tl.float32) * w
    if KEEP:
        tl.store(y + row * D + cols, out, mask=mask)
    if QUANTIZE:
        rounded = out.to(x.dtype.element_ty).to(tl.float32)
        _store_fp8(rounded, fp8, scale, row, cols, mask, D)


@triton.jit
def _rms_norm_backward_kernel(
    dy, x, rstd, weight, residual, dx, y, D,
    OFFSET: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    at = row * D + cols
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    res = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    if OFFSET:
        w = w + 1.0
    hat = v * r
    if AGAIN:
        if OFFSET:
            tl.store(y + at, hat * w, mask=mask)
        else:
            tl.store(y + at, hat.to(x.dtype.element_ty).to(tl.float32) * w, mask=mask)
    g = g * w
    out = r * (g - hat * (tl.sum(g * hat, axis=0) / D)) + res
    tl.store(dx + at, out, mask=mask)


@triton.jit
def _rotate_kernel(
    states,
    cos,
    sin,
    stride_t,
    stride_cos,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, WIDTH // 2)
    c = tl.load(cos + row * stride_cos + half).to(tl.float32)[None, :]
    s = tl.load(sin + row * stride_cos + half).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        at = states + row * stride_t + heads[:, None] * WIDTH + half[None, :]
        mask = heads[:, None] < HEADS
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + WIDTH // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, a * c - b * s, mask=mask)
        tl.store(at + WIDTH // 2, b * c + a * s, mask=mask)


@triton.jit
def _act(x, SILU: tl.constexpr):
    if SILU:
        return x * tl.sigmoid(x)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + (2.0 * tl.sigmoid(2.0 * inner) - 1.0))


@triton.jit
def _act_slope(x, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    d = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * d


@triton.jit
def _glu_kernel(
    gate_up, out, fp8, scale, stride, F,
    SILU: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gate_up + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    value = _act(gate, SILU).to(gate_up.dtype.element_ty).to(tl.float32) * up
    if KEEP:
        tl.store(out + row * F + cols, value, mask=mask)
    if QUANTIZE:
        rounded = value.to(gate_up.dtype.element_ty).to(tl.float32)
        _store_fp8(rounded, fp8, scale, row, cols, mask, F)


@triton.jit
def _glu_backward_kernel(
    grad, gate_up, column_scale, fp8, scale, out, stride, F,
    SILU: tl.constexpr, AGAIN: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    g = tl.load(grad + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    d_gate = (g * up * _act_slope(gate, SILU)).to(gate_up.dtype.element_ty)
    active = _act(gate, SILU)
    d_up = (g * active).to(gate_up.dtype.element_ty)
    if AGAIN:
        kept = active.to(gate_up.dtype.element_ty).to(tl.float32)
        tl.store(out + row * F + cols, kept * up, mask=mask)
    if KEEP:
        tl.store(gate_up + row * stride + cols, d_gate, mask=mask)
        tl.store(gate_up + row * stride + F + cols, d_up, mask=mask)
    if QUANTIZE:
        a = d_gate.to(tl.float32) * tl.load(column_scale + cols, mask=mask, other=0.0)
        b = d_up.to(tl.float32) * tl.load(column_scale + F + cols, mask=mask, other=0.0)
        s = tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0), 1e-12) / 448.0
        tl.store(scale + row, s)
        tl.store(fp8 + row * 2 * F + cols, (a / s).to(tl.float8e4nv), mask=mask)
        tl.store(fp8 + row * 2 * F + F + cols, (b / s).to(tl.float8e4nv), mask=mask)


@triton.jit
def _join_kernel(
    q, k, v, cos, sin, out, stride_q, stride_k, stride_v, stride_cos,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, WIDTH // 2)
    c = tl.load(cos + row * stride_cos + half).to(tl.float32)[None, :]
    s = tl.load(sin + row * stride_cos + half).to(tl.float32)[None, :]
    to = out + row * (HEADS + 2 * KV_HEADS) * WIDTH
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)[:, None]
        mask = heads < HEADS
        a = tl.load(q + row * stride_q + heads * WIDTH + half, mask=mask, other=0.0)
        b = tl.load(q + row * stride_q + heads * WIDTH + WIDTH // 2 + half, mask=mask, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        tl.store(to + heads * WIDTH + half, a * c + b * s, mask=mask)
        tl.store(to + heads * WIDTH + WIDTH // 2 + half, b * c - a * s, mask=mask)
    for start in range(0, KV_HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)[:, None]
        mask = heads < KV_HEADS
        a = tl.load(k + row * stride_k + heads * WIDTH + half, mask=mask, other=0.0)
        b = tl.load(k + row * stride_k + heads * WIDTH + WIDTH // 2 + half, mask=mask, other=0.0)
        x = tl.load(v + row * stride_v + heads * WIDTH + half, mask=mask, other=0.0)
        y = tl.load(v + row * stride_v + heads * WIDTH + WIDTH // 2 + half, mask=mask, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        at = to + (HEADS + heads) * WIDTH + half
        tl.store(at, a * c + b * s, mask=mask)
        tl.store(at + WIDTH // 2, b * c - a * s, mask=mask)
        at = at + KV_HEADS * WIDTH
        tl.store(at, x, mask=mask)
        tl.store(at + WIDTH // 2, y, mask=mask)


@triton.jit
def _quantize_kernel(
    x, column_scale, out, scale, stride, D, HAS_COLUMN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    v = tl.load(x + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_COLUMN:
        v = v * tl.load(column_scale + cols, mask=mask, other=0.0)
    _store_fp8(v, out, scale, row, cols, mask, D)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def _fp8_like(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    unit_offset: bool,
    quantize: bool = False,
    keep: bool = True,
) -> tuple[Operand, Tensor]:
    """See `torch_ops.rms_norm`."""
    rows, width = x_TD.shape
    keep = keep or not quantize
    y = torch.empty_like(x_TD) if keep else x_TD
    rstd = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    fp8, scale = _fp8_like(rows, width, x_TD.device) if quantize else (x_TD, rstd)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x_TD, weight_D, y, fp8, scale, rstd, x_TD.stride(0), width, eps,
        OFFSET=unit_offset, KEEP=keep, QUANTIZE=quantize, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Operand(y if keep else None, *((fp8, scale) if quantize else (None, None))), rstd


def rms_norm_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    residual_TD: Tensor,
    *,
    unit_offset: bool,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `torch_ops.rms_norm_backward`."""
    rows, width = x_TD.shape
    dx = torch.empty_like(x_TD)
    y = torch.empty_like(x_TD) if again else None
    block = triton.next_power_of_2(width)
    _rms_norm_backward_kernel[(rows,)](
        grad_TD, x_TD, rstd_T, weight_D, residual_TD, dx, dx if y is None else y, width,
        OFFSET=unit_offset, AGAIN=again, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, y


def rotate_(
    states_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, num_heads: int, inverse: bool
) -> None:
    """See `torch_ops.rotate_`."""
    rows, _, width = states_THK.shape
    _rotate_kernel[(rows,)](
        states_THK, cos_TK, sin_TK, states_THK.stride(0), cos_TK.stride(0),
        WIDTH=width, HEADS=num_heads, INVERSE=inverse, BLOCK_H=16, num_warps=4,
    )  # fmt: skip


def glu(
    gate_up_TF: Tensor, *, activation: Activation, quantize: bool = False, keep: bool = True
) -> Operand:
    """See `torch_ops.glu`."""
    rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    keep = keep or not quantize
    out = gate_up_TF.new_empty(rows, width) if keep else gate_up_TF
    fp8, scale = _fp8_like(rows, width, out.device) if quantize else (out, out)
    # A row scale needs the whole row in one program; without one, smaller blocks run faster.
    block = triton.next_power_of_2(width) if quantize else 2048
    _glu_kernel[(rows, triton.cdiv(width, block))](
        gate_up_TF, out, fp8, scale, gate_up_TF.stride(0), width,
        SILU=activation == "silu", KEEP=keep, QUANTIZE=quantize, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return Operand(out if keep else None, *((fp8, scale) if quantize else (None, None)))


def glu_backward_(
    grad_TF: Tensor,
    gate_up_TF: Tensor,
    *,
    activation: Activation,
    column_scale_F: Tensor | None = None,
    keep: bool = True,
    again: bool = False,
) -> tuple[Operand, Tensor | None]:
    """See `torch_ops.glu_backward_`."""
    rows, width = grad_TF.shape
    quantize = column_scale_F is not None
    keep = keep or not quantize
    fp8, scale = _fp8_like(rows, 2 * width, grad_TF.device) if quantize else (grad_TF, grad_TF)
    out = torch.empty_like(grad_TF) if again else None
    block = triton.next_power_of_2(width) if quantize else 2048
    _glu_backward_kernel[(rows, triton.cdiv(width, block))](
        grad_TF, gate_up_TF, column_scale_F if quantize else grad_TF, fp8, scale,
        grad_TF if out is None else out,
        gate_up_TF.stride(0), width, SILU=activation == "silu", AGAIN=again, KEEP=keep,
        QUANTIZE=quantize, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    gradient = Operand(gate_up_TF if keep else None, *((fp8, scale) if quantize else (None, None)))
    return gradient, out


def join_rotated(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor
) -> Tensor:
    """See `torch_ops.join_rotated`."""
    rows, heads, width = q_THK.shape
    kv_heads = k_THK.shape[1]
    out = q_THK.new_empty(rows, heads + 2 * kv_heads, width)
    q, k, v = (t if t.stride()[1:] == (width, 1) else t.contiguous() for t in (q_THK, k_THK, v_THK))
    _join_kernel[(rows,)](
        q, k, v, cos_TK, sin_TK, out, q.stride(0), k.stride(0), v.stride(0), cos_TK.stride(0),
        WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, BLOCK_H=16, num_warps=4,
    )  # fmt: skip
    return out


def quantize_rows(x_TD: Tensor, *, column_scale_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `torch_ops.quantize_rows`."""
    rows, width = x_TD.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(width)
    _quantize_kernel[(rows,)](
        x_TD, scale if column_scale_D is None else column_scale_D, out, scale, x_TD.stride(0),
        width, HAS_COLUMN=column_scale_D is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, scale

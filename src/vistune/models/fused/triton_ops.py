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
def _store_fp8(v, out, scale, row, cols, mask, pitch):
    s = tl.maximum(tl.max(tl.abs(v), axis=0), 1e-12) / 448.0
    tl.store(scale + row, s)
    tl.store(out + row * pitch + cols, (v / s).to(tl.float8e4nv), mask=mask)
    return s


@triton.jit
def _store_twice(v, s, at, C: tl.constexpr):
    # What rounding takes from the values v at the chosen channels, and those values once more.
    high = (v / s).to(tl.float8e4nv)
    tl.store(at, (v / s - high.to(tl.float32)).to(tl.float8e4nv))
    tl.store(at + C, high)


@triton.jit
def _rms_norm_kernel(
    x, weight, y, fp8, scale, rstd, channels, stride_x, D, eps,
    OFFSET: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
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
        s = _store_fp8(rounded, fp8, scale, row, cols, mask, D + 2 * TWICE)
        if TWICE:
            chosen = tl.arange(0, TWICE)
            at = tl.load(channels + chosen)
            v = tl.load(x + row * stride_x + at).to(tl.float32) * r
            w = tl.load(weight + at).to(tl.float32)
            if OFFSET:  # noqa: SIM108
                v = v * (1.0 + w)
            else:
                v = v.to(x.dtype.element_ty).to(tl.float32) * w
            v = v.to(x.dtype.element_ty).to(tl.float32)
            _store_twice(v, s, fp8 + row * (D + 2 * TWICE) + D + chosen, TWICE)


@triton.jit
def _rms_norm_backward_kernel(
    dy, x, rstd, weight, residual, dx, y, dw, rows, D,
    OFFSET: tl.constexpr, AGAIN: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One row a program, or several where the weight's gradient is summed over them first.
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        w = w + 1.0
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(first, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        at = row * D + cols
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        hat = v * r
        if AGAIN:
            if OFFSET:
                tl.store(y + at, hat * w, mask=mask)
            else:
                tl.store(y + at, hat.to(x.dtype.element_ty).to(tl.float32) * w, mask=mask)
        if WEIGHT:
            total += g * hat
        g = g * w
        out = r * (g - hat * (tl.sum(g * hat, axis=0) / D))
        if RESIDUAL:
            out += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out, mask=mask)
    if WEIGHT:
        tl.store(dw + first * D + cols, total, mask=mask)


@triton.jit
def _head_norm_kernel(
    heads, query, key, out, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * (HEADS + 2 * KV_HEADS) * WIDTH
    cols = tl.arange(0, BLOCK_W)[None, :]
    wq = tl.load(query + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    wk = tl.load(key + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    if OFFSET:
        wq += 1.0
        wk += 1.0
    for start in range(0, HEADS + 2 * KV_HEADS, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        mask = (head < HEADS + 2 * KV_HEADS) & (cols < WIDTH)
        v = tl.load(heads + row + head * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
        hat = v / tl.sqrt(tl.sum(v * v, axis=1)[:, None] / WIDTH + eps)
        if not OFFSET:
            hat = hat.to(heads.dtype.element_ty).to(tl.float32)
        normed = hat * tl.where(head < HEADS, wq, wk)
        normed = tl.where(head < HEADS + KV_HEADS, normed, v)
        tl.store(out + row + head * WIDTH + cols, normed, mask=mask)


@triton.jit
def _head_norm_backward_kernel(
    grad, heads, query, key, dw, rows, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OFFSET: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK_W)[None, :]
    wq = tl.load(query + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    wk = tl.load(key + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    if OFFSET:
        wq += 1.0
        wk += 1.0
    of_query = tl.zeros([1, BLOCK_W], dtype=tl.float32)
    of_key = tl.zeros([1, BLOCK_W], dtype=tl.float32)
    for number in range(first, rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64) * (HEADS + 2 * KV_HEADS) * WIDTH
        for start in range(0, HEADS + KV_HEADS, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)[:, None]
            mask = (head < HEADS + KV_HEADS) & (cols < WIDTH)
            at = row + head * WIDTH + cols
            v = tl.load(heads + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            r = 1.0 / tl.sqrt(tl.sum(v * v, axis=1)[:, None] / WIDTH + eps)
            hat = v * r
            if WEIGHT:
                both = g * hat
                of_query += tl.sum(tl.where(head < HEADS, both, 0.0), axis=0)[None, :]
                of_key += tl.sum(tl.where(head < HEADS, 0.0, both), axis=0)[None, :]
            g = g * tl.where(head < HEADS, wq, wk)
            dx = r * (g - hat * (tl.sum(g * hat, axis=1)[:, None] / WIDTH))
            tl.store(grad + at, dx, mask=mask)
    if WEIGHT:
        tl.store(dw + first * 2 * WIDTH + cols, of_query, mask=cols < WIDTH)
        tl.store(dw + first * 2 * WIDTH + WIDTH + cols, of_key, mask=cols < WIDTH)


@triton.jit
def _rotate_kernel(
    states, cos, sin, bias, stride_t, stride_cos,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BIASED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_W)
    inside = half < WIDTH // 2
    c = tl.load(cos + row * stride_cos + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * stride_cos + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)
        at = states + row * stride_t + heads[:, None] * WIDTH + half[None, :]
        mask = (heads[:, None] < HEADS) & inside[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + WIDTH // 2, mask=mask, other=0.0).to(tl.float32)
        first = a * c - b * s
        second = b * c + a * s
        if BIASED > 0:
            # The last BIASED heads; in the slower half of the frequencies less position 0's.
            number = heads[:, None] - (HEADS - BIASED)
            known = mask & (number >= 0)
            of = bias + number * WIDTH + half[None, :]
            a = tl.load(of, mask=known, other=0.0).to(tl.float32)
            b = tl.load(of + WIDTH // 2, mask=known, other=0.0).to(tl.float32)
            less = c - tl.where(half >= WIDTH // 4, 1.0, 0.0)[None, :]
            first += a * less - b * s
            second += b * less + a * s
        tl.store(at, first, mask=mask)
        tl.store(at + WIDTH // 2, second, mask=mask)


@triton.jit
def _act(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(0.7071067811865476 * x))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + (2.0 * tl.sigmoid(2.0 * inner) - 1.0))


@triton.jit
def _act_slope(x, KIND: tl.constexpr):
    if KIND == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.math.erf(0.7071067811865476 * x)) + x * density
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    d = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * d


@triton.jit
def _glu_kernel(
    gate_up, out, fp8, scale, channels, stride, F,
    KIND: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gate_up + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    value = _act(gate, KIND).to(gate_up.dtype.element_ty).to(tl.float32) * up
    if KEEP:
        tl.store(out + row * F + cols, value, mask=mask)
    if QUANTIZE:
        rounded = value.to(gate_up.dtype.element_ty).to(tl.float32)
        s = _store_fp8(rounded, fp8, scale, row, cols, mask, F + 2 * TWICE)
        if TWICE:
            chosen = tl.arange(0, TWICE)
            at = gate_up + row * stride + tl.load(channels + chosen)
            v = _act(tl.load(at).to(tl.float32), KIND).to(gate_up.dtype.element_ty)
            v = v.to(tl.float32) * tl.load(at + F).to(tl.float32)
            v = v.to(gate_up.dtype.element_ty).to(tl.float32)
            _store_twice(v, s, fp8 + row * (F + 2 * TWICE) + F + chosen, TWICE)


@triton.jit
def _glu_backward_kernel(
    grad, gate_up, column_scale, fp8, scale, out, stride, F,
    KIND: tl.constexpr, AGAIN: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    g = tl.load(grad + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=mask, other=0.0).to(tl.float32)
    d_gate = (g * up * _act_slope(gate, KIND)).to(gate_up.dtype.element_ty)
    active = _act(gate, KIND)
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
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_W)
    inside = half < WIDTH // 2
    c = tl.load(cos + row * stride_cos + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * stride_cos + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = out + row * (HEADS + 2 * KV_HEADS) * WIDTH
    for start in range(0, HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < HEADS) & inside[None, :]
        a = tl.load(q + row * stride_q + heads * WIDTH + half, mask=mask, other=0.0)
        b = tl.load(q + row * stride_q + heads * WIDTH + WIDTH // 2 + half, mask=mask, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        tl.store(to + heads * WIDTH + half, a * c + b * s, mask=mask)
        tl.store(to + heads * WIDTH + WIDTH // 2 + half, b * c - a * s, mask=mask)
    for start in range(0, KV_HEADS, BLOCK_H):
        heads = start + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < KV_HEADS) & inside[None, :]
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
    x, column_scale, out, scale, channels, stride, D,
    HAS_COLUMN: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    v = tl.load(x + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_COLUMN:
        v = v * tl.load(column_scale + cols, mask=mask, other=0.0)
    s = _store_fp8(v, out, scale, row, cols, mask, D + 2 * TWICE)
    if TWICE:
        chosen = tl.arange(0, TWICE)
        at = tl.load(channels + chosen)
        v = tl.load(x + row * stride + at).to(tl.float32)
        if HAS_COLUMN:
            v = v * tl.load(column_scale + at)
        _store_twice(v, s, out + row * (D + 2 * TWICE) + D + chosen, TWICE)


_SUMS = 528
"""Programs that sum a weight's gradient, each over its rows: four for each multiprocessor."""


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


def _num(channels_C: Tensor | None) -> int:
    return 0 if channels_C is None else channels_C.shape[0]


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
    channels_C: Tensor | None = None,
) -> tuple[Operand, Tensor]:
    """See `torch_ops.rms_norm`."""
    rows, width = x_TD.shape
    keep = keep or not quantize
    y = torch.empty_like(x_TD) if keep else x_TD
    rstd = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    twice = _num(channels_C)
    fp8, scale = _fp8_like(rows, width + 2 * twice, x_TD.device) if quantize else (x_TD, rstd)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x_TD, weight_D, y, fp8, scale, rstd, rstd if channels_C is None else channels_C,
        x_TD.stride(0), width, eps,
        OFFSET=unit_offset, KEEP=keep, QUANTIZE=quantize, TWICE=twice, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return Operand(y if keep else None, *((fp8, scale) if quantize else (None, None))), rstd


def rms_norm_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    residual_TD: Tensor | None,
    *,
    unit_offset: bool,
    again: bool = False,
    weight_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `torch_ops.rms_norm_backward`."""
    rows, width = x_TD.shape
    dx = torch.empty_like(x_TD)
    y = torch.empty_like(x_TD) if again else None
    programs = min(rows, _SUMS) if weight_gradient else rows
    sums = rstd_T.new_empty(programs, width) if weight_gradient else None
    block = triton.next_power_of_2(width)
    _rms_norm_backward_kernel[(programs,)](
        grad_TD, x_TD, rstd_T, weight_D, dx if residual_TD is None else residual_TD, dx,
        dx if y is None else y, rstd_T if sums is None else sums, rows, width,
        OFFSET=unit_offset, AGAIN=again, RESIDUAL=residual_TD is not None,
        WEIGHT=weight_gradient, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, y, None if sums is None else sums.sum(0)


def head_norm(
    heads_THK: Tensor,
    query_K: Tensor,
    key_K: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    unit_offset: bool,
) -> Tensor:
    """See `torch_ops.head_norm`."""
    out = torch.empty_like(heads_THK)
    width = heads_THK.shape[2]
    _head_norm_kernel[(heads_THK.shape[0],)](
        heads_THK, query_K, key_K, out, eps,
        WIDTH=width, HEADS=num_heads, KV_HEADS=num_kv_heads, OFFSET=unit_offset,
        BLOCK_H=16, BLOCK_W=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


def head_norm_backward_(
    grad_THK: Tensor,
    heads_THK: Tensor,
    query_K: Tensor,
    key_K: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    unit_offset: bool,
    weight_gradient: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """See `torch_ops.head_norm_backward_`."""
    rows, _, width = heads_THK.shape
    programs = min(rows, _SUMS) if weight_gradient else rows
    shape = (programs, 2, width) if weight_gradient else (1,)
    sums = torch.empty(shape, dtype=torch.float32, device=grad_THK.device)
    _head_norm_backward_kernel[(programs,)](
        grad_THK, heads_THK, query_K, key_K, sums, rows, eps,
        WIDTH=width, HEADS=num_heads, KV_HEADS=num_kv_heads, OFFSET=unit_offset,
        WEIGHT=weight_gradient, BLOCK_H=16, BLOCK_W=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    if not weight_gradient:
        return None
    query, key = sums.sum(0)
    return query, key


def rotate_(
    states_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, num_heads: int, inverse: bool,
    key_bias_HK: Tensor | None = None,
) -> None:  # fmt: skip
    """See `torch_ops.rotate_`."""
    rows, _, width = states_THK.shape
    _rotate_kernel[(rows,)](
        states_THK, cos_TK, sin_TK, cos_TK if key_bias_HK is None else key_bias_HK,
        states_THK.stride(0), cos_TK.stride(0), WIDTH=width, HEADS=num_heads,
        BIASED=0 if key_bias_HK is None else key_bias_HK.shape[0], INVERSE=inverse, BLOCK_H=16,
        BLOCK_W=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip


def glu(
    gate_up_TF: Tensor,
    *,
    activation: Activation,
    quantize: bool = False,
    keep: bool = True,
    channels_C: Tensor | None = None,
) -> Operand:
    """See `torch_ops.glu`."""
    rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    keep = keep or not quantize
    out = gate_up_TF.new_empty(rows, width) if keep else gate_up_TF
    twice = _num(channels_C)
    fp8, scale = _fp8_like(rows, width + 2 * twice, out.device) if quantize else (out, out)
    # A row scale needs the whole row in one program; without one, smaller blocks run faster.
    block = triton.next_power_of_2(width) if quantize else 2048
    _glu_kernel[(rows, triton.cdiv(width, block))](
        gate_up_TF, out, fp8, scale, scale if channels_C is None else channels_C,
        gate_up_TF.stride(0), width,
        KIND=activation, KEEP=keep, QUANTIZE=quantize, TWICE=twice, BLOCK=block,
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
        gate_up_TF.stride(0), width, KIND=activation, AGAIN=again, KEEP=keep,
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
        WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, BLOCK_H=16,
        BLOCK_W=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out


def quantize_rows(
    x_TD: Tensor, *, column_scale_D: Tensor | None = None, channels_C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.quantize_rows`."""
    rows, width = x_TD.shape
    twice = _num(channels_C)
    out, scale = _fp8_like(rows, width + 2 * twice, x_TD.device)
    block = triton.next_power_of_2(width)
    _quantize_kernel[(rows,)](
        x_TD, scale if column_scale_D is None else column_scale_D, out, scale,
        scale if channels_C is None else channels_C, x_TD.stride(0), width,
        HAS_COLUMN=column_scale_D is not None, TWICE=twice, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, scale

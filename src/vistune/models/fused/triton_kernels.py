"""The Triton kernels behind `triton_ops`.

Memory-bound throughout: every kernel reads each input once and writes each output once. Arithmetic
is float32; what is stored rounds where the transformers layer rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def rms_norm_kernel(
    x, weight, y, fp8, scale, rstd, channels, stride_x, D, eps,
    OFFSET: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; see `torch_ops.rms_norm`."""
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
def rms_norm_backward_kernel(
    dy, x, rstd, weight, residual, dx, y, dw, rows, D,
    OFFSET: tl.constexpr, AGAIN: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, or several where the weight's gradient is summed over them first."""
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
def head_norm_kernel(
    heads, query, key, out, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """All heads of one position; see `torch_ops.head_norm`."""
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
def head_norm_backward_kernel(
    grad, heads, query, key, dw, rows, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OFFSET: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Over `grad` itself; see `torch_ops.head_norm_backward_`."""
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
def rotate_kernel(
    states, cos, sin, bias, stride_t, stride_cos,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BIASED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """All heads of one position; see `torch_ops.rotate_`."""
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
def glu_kernel(
    gate_up, out, fp8, scale, channels, stride, F,
    KIND: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr, TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row; see `torch_ops.glu`."""
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
def glu_backward_kernel(
    grad, gate_up, column_scale, fp8, scale, out, stride, F,
    KIND: tl.constexpr, AGAIN: tl.constexpr, KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Over `gate_up` itself; see `torch_ops.glu_backward_`."""
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
def join_kernel(
    q, k, v, cos, sin, out, stride_q, stride_k, stride_v, stride_cos,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """All heads of one position; see `torch_ops.join_rotated`."""
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
def _drop(x, add, out, first, drawn, D, p, scale, ADD: tl.constexpr, BLOCK: tl.constexpr):
    cols = first + tl.arange(0, BLOCK)
    mask = cols < D
    v = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
    v = tl.where(tl.uint_to_uniform_float(drawn) >= p, v * scale, 0.0)
    if ADD:
        v += tl.load(add + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + cols, v, mask=mask)


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(
    x, add, out, seed, stride_x, stride_add, stride_out, D, p, scale,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Four blocks of one row; see `torch_ops.dropout`."""
    row = tl.program_id(0)
    # A draw (Philox) gives four numbers, each for one block: counted by place and row, not by
    # offset, which 32 bits do not hold.
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = place * 0
    a, b, c, d = tl.philox(seed, place, zero + row, zero, zero)
    at = row.to(tl.int64)
    x += at * stride_x
    add += at * stride_add
    out += at * stride_out
    first = tl.program_id(1) * 4 * BLOCK
    _drop(x, add, out, first, a, D, p, scale, ADD, BLOCK)
    _drop(x, add, out, first + BLOCK, b, D, p, scale, ADD, BLOCK)
    _drop(x, add, out, first + 2 * BLOCK, c, D, p, scale, ADD, BLOCK)
    _drop(x, add, out, first + 3 * BLOCK, d, D, p, scale, ADD, BLOCK)


@triton.jit
def quantize_kernel(
    x, column_scale, out, scale, channels, stride, D,
    HAS_COLUMN: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; see `torch_ops.quantize_rows`."""
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

"""The elementwise steps of a decoder layer as Triton kernels; same names as `torch_ops`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vistune.models.fused import triton_kernels as kernels
from vistune.models.fused.torch_ops import Activation, Operand, kept_scale

_SUMS = 528
"""Programs that sum a weight's gradient, each over its rows: four for each multiprocessor."""
_DROPPED = 512
"""Numbers that a program of dropout draws four times."""


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
    kernels.rms_norm_kernel[(rows,)](
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
    kernels.rms_norm_backward_kernel[(programs,)](
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
    kernels.head_norm_kernel[(heads_THK.shape[0],)](
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
    kernels.head_norm_backward_kernel[(programs,)](
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
    kernels.rotate_kernel[(rows,)](
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
    kernels.glu_kernel[(rows, triton.cdiv(width, block))](
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
    kernels.glu_backward_kernel[(rows, triton.cdiv(width, block))](
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
    kernels.join_kernel[(rows,)](
        q, k, v, cos_TK, sin_TK, out, q.stride(0), k.stride(0), v.stride(0), cos_TK.stride(0),
        WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, BLOCK_H=16,
        BLOCK_W=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
    return out


def dropout(x_TD: Tensor, *, p: float, seed: int) -> Tensor:
    """See `torch_ops.dropout`."""
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _drop(x_TD, None, out, p=p, seed=seed)
    return out


def dropout_(x_TD: Tensor, *, p: float, seed: int, add_TD: Tensor | None = None) -> None:
    """See `torch_ops.dropout_`."""
    _drop(x_TD, add_TD, x_TD, p=p, seed=seed)


def _drop(x_TD: Tensor, add_TD: Tensor | None, out_TD: Tensor, *, p: float, seed: int) -> None:
    rows, width = x_TD.shape
    add = x_TD if add_TD is None else add_TD
    block = min(_DROPPED, triton.next_power_of_2(triton.cdiv(width, 4)))
    kernels.dropout_kernel[(rows, triton.cdiv(width, 4 * block))](
        x_TD, add, out_TD, seed, x_TD.stride(0), add.stride(0), out_TD.stride(0), width,
        p, kept_scale(p), ADD=add_TD is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def quantize_rows(
    x_TD: Tensor, *, column_scale_D: Tensor | None = None, channels_C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.quantize_rows`."""
    rows, width = x_TD.shape
    twice = _num(channels_C)
    out, scale = _fp8_like(rows, width + 2 * twice, x_TD.device)
    block = triton.next_power_of_2(width)
    kernels.quantize_kernel[(rows,)](
        x_TD, scale if column_scale_D is None else column_scale_D, out, scale,
        scale if channels_C is None else channels_C, x_TD.stride(0), width,
        HAS_COLUMN=column_scale_D is not None, TWICE=twice, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, scale

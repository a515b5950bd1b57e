"""The elementwise steps of a decoder layer in plain torch: the reference, and the CPU path."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]
FP8_MAX = 448.0
"""Largest number of e4m3."""


class Operand(NamedTuple):
    """Activations on their way into a matrix product: as they are, in FP8, or both.

    Args:
        plain: [T, D] in the model's format, or None where nobody reads it.
        fp8: [T, D] e4m3, or [T, D + 2C] with channels held twice (`quantize_rows`), or None.
        scale: float32 [T, 1]; the activations are about fp8 * scale.
    """

    plain: Tensor | None
    fp8: Tensor | None = None
    scale: Tensor | None = None


def dropout(x_TD: Tensor, *, p: float, seed: int) -> Tensor:
    """Drops each number with probability `p` and scales the others by 1 / (1 - p).

    The same seed and shape drop the same places again, so nobody keeps a mask.

    Args:
        x_TD: [T, D].
        p: From 0 to 1.
        seed: Not negative, below 2^63; another one drops other places. `triton_ops` draws other
            numbers from it than this does.
    """
    return _dropped(x_TD, p, seed).to(x_TD.dtype)


def dropout_(x_TD: Tensor, *, p: float, seed: int, add_TD: Tensor | None = None) -> None:
    """As `dropout`, in place, and then adds `add_TD` where that is given."""
    dropped = _dropped(x_TD, p, seed)
    x_TD.copy_(dropped if add_TD is None else dropped + add_TD.float())


def _dropped(x_TD: Tensor, p: float, seed: int) -> Tensor:
    drawn = torch.Generator(x_TD.device).manual_seed(seed)
    kept = torch.rand(x_TD.shape, generator=drawn, device=x_TD.device) >= p
    return torch.where(kept, x_TD.float() * kept_scale(p), 0.0)


def kept_scale(p: float) -> float:
    """Returns what the numbers that are not dropped are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def _operand(
    x_TD: Tensor,
    *,
    quantize: bool,
    keep: bool,
    column_scale_D: Tensor | None = None,
    channels_C: Tensor | None = None,
) -> Operand:
    if not quantize:
        return Operand(x_TD)
    fp8, scale = quantize_rows(x_TD, column_scale_D=column_scale_D, channels_C=channels_C)
    return Operand(x_TD if keep else None, fp8, scale)


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
    """Root-mean-square norm.

    Args:
        x_TD: [T, D].
        weight_D: [D].
        eps: Added to the mean square.
        unit_offset: True where the weight is stored minus one (Gemma).
        quantize: Also give the result in FP8.
        keep: With `quantize`, also give it as it is.
        channels_C: With `quantize`, channels held twice (`quantize_rows`).

    Returns:
        The normalised [T, D] and the reciprocal root mean squares, float32 [T].
    """
    x = x_TD.float()
    rstd_T = torch.rsqrt(x.pow(2).mean(-1) + eps)
    normed = x * rstd_T[:, None]
    if unit_offset:
        y = (normed * (1.0 + weight_D.float())).to(x_TD.dtype)
    else:
        y = (weight_D * normed.to(x_TD.dtype)).to(x_TD.dtype)
    return _operand(y, quantize=quantize, keep=keep, channels_C=channels_C), rstd_T


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
    """Gradient of `rms_norm` with respect to its input, plus the residual branch's gradient.

    Args:
        grad_TD: Gradient of the normalised output.
        x_TD: The input of the forward pass.
        rstd_T: From the forward pass.
        weight_D: The norm's weight.
        residual_TD: Gradient that reaches the input past the norm, or None.
        unit_offset: As in `rms_norm`.
        again: Also give the forward output once more, which trained weights read.
        weight_gradient: Also give the gradient of the norm's weight.

    Returns:
        [T, D] in the format of `x_TD`; the forward output or None; float32 [D] or None.
    """
    # y = w x r with r = (mean(x^2) + eps)^-1/2, so dx = r (g - h mean(g h)), g = w dy, h = x r.
    weight = weight_D.float() + (1.0 if unit_offset else 0.0)
    hat = x_TD.float() * rstd_T[:, None]
    incoming = grad_TD.float()
    grad = incoming * weight
    dx = rstd_T[:, None] * (grad - hat * (grad * hat).mean(-1, keepdim=True))
    dx = (dx if residual_TD is None else dx + residual_TD.float()).to(x_TD.dtype)
    of_weight = (incoming * hat).sum(0) if weight_gradient else None
    if not again:
        return dx, None, of_weight
    if unit_offset:
        return dx, (hat * weight).to(x_TD.dtype), of_weight
    return dx, (weight_D * hat.to(x_TD.dtype)).to(x_TD.dtype), of_weight


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
    """Root-mean-square norm of each query and key head; value heads are copied.

    Args:
        heads_THK: [T, heads, head width]: queries, then keys, then values.
        query_K: Weight for query heads.
        key_K: Weight for key heads.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        eps: Added to the mean square.
        unit_offset: True where the weights are stored minus one.

    Returns:
        [T, heads, head width].
    """
    out, at = heads_THK.clone(), 0
    for weight, count in ((query_K, num_heads), (key_K, num_kv_heads)):
        part = heads_THK[:, at : at + count]
        norm = {"eps": eps, "unit_offset": unit_offset}
        normed, _ = rms_norm(part.reshape(-1, part.shape[-1]), weight, **norm)  # type: ignore[arg-type]
        assert normed.plain is not None
        out[:, at : at + count] = normed.plain.view_as(part)
        at += count
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
    """Turns the gradient of `head_norm`'s result into that of its input, in place.

    Returns:
        Gradients of both weights, float32 [head width], or None.
    """
    found, at = [], 0
    for weight, count in ((query_K, num_heads), (key_K, num_kv_heads)):
        grad, x = (t[:, at : at + count] for t in (grad_THK, heads_THK))
        flat = x.reshape(-1, x.shape[-1])
        rstd = torch.rsqrt(flat.float().pow(2).mean(-1) + eps)
        dx, _, of_weight = rms_norm_backward(
            grad.reshape(flat.shape), flat, rstd, weight, None,
            unit_offset=unit_offset, weight_gradient=weight_gradient,
        )  # fmt: skip
        grad_THK[:, at : at + count] = dx.view_as(x)
        found.append(of_weight)
        at += count
    query, key = found
    return None if query is None or key is None else (query, key)


def rotate_(
    states_THK: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    num_heads: int,
    inverse: bool,
    key_bias_HK: Tensor | None = None,
) -> None:
    """Applies rotary positions in place to the first `num_heads` heads.

    A key bias can be a thousand times what tells keys apart (Qwen2.5: 354), and sits where heads
    turn slowly: rounded to bf16 with it, keys lose what tells them apart. So it is added here, in
    fp32, and its part in the slower half of the frequencies less what it is at position 0. That
    takes the same vector from all keys of a head, which moves all scores of a query alike and so no
    attention weight.

    Args:
        states_THK: [T, heads, head width]; halves are rotated against each other (NeoX style).
        cos_TK: [T, head width]; both halves equal.
        sin_TK: [T, head width]; both halves equal.
        num_heads: Query and key heads; value heads behind them stay.
        inverse: True for the gradient.
        key_bias_HK: Bias not yet in the last of these heads, [key heads, head width].
    """
    half = states_THK.shape[-1] // 2
    turned = states_THK[:, :num_heads]
    cos, sin = cos_TK[:, None, :half], sin_TK[:, None, :half]
    sin = -sin if inverse else sin
    first, second = turned[..., :half].clone(), turned[..., half:].clone()
    if key_bias_HK is None:
        turned[..., :half] = first * cos - second * sin
        turned[..., half:] = second * cos + first * sin
        return
    bias_THK = states_THK.new_zeros(1, num_heads, 2 * half, dtype=torch.float32)
    bias_THK[:, num_heads - key_bias_HK.shape[0] :] = key_bias_HK.float()
    b, d = bias_THK.chunk(2, dim=-1)
    less = (torch.arange(half, device=cos.device) >= half // 2).float()
    turned[..., :half] = first.float() * cos - second.float() * sin + b * (cos - less) - d * sin
    turned[..., half:] = second.float() * cos + first.float() * sin + d * (cos - less) + b * sin


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu(
    gate_up_TF: Tensor,
    *,
    activation: Activation,
    quantize: bool = False,
    keep: bool = True,
    channels_C: Tensor | None = None,
) -> Operand:
    """Gated unit: activation(first half) * second half of [T, 2F], giving [T, F].

    The other arguments are those of `rms_norm`.
    """
    gate, up = gate_up_TF.chunk(2, dim=-1)
    active = _activate(gate, activation) * up
    return _operand(active, quantize=quantize, keep=keep, channels_C=channels_C)


def glu_backward_(
    grad_TF: Tensor,
    gate_up_TF: Tensor,
    *,
    activation: Activation,
    column_scale_F: Tensor | None = None,
    keep: bool = True,
    again: bool = False,
) -> tuple[Operand, Tensor | None]:
    """Gradient of `glu` with respect to its input; may be written over `gate_up_TF`.

    Args:
        grad_TF: Gradient of the output [T, F].
        gate_up_TF: The forward pass's input [T, 2F]; not to be read afterwards.
        activation: As in `glu`.
        column_scale_F: [2F]; when given, the gradient times it is also given in FP8.
        keep: With `column_scale_F`, also give the plain gradient.
        again: Also give the forward output once more, which adapters read.

    Returns:
        The gradient [T, 2F], and the forward output [T, F] or None.
    """
    gate, up = (half.float() for half in gate_up_TF.chunk(2, dim=-1))
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = _activate(leaf, activation)
        (slope,) = torch.autograd.grad(active.sum(), leaf)
    grad = grad_TF.float()
    both = torch.cat([grad * up * slope, grad * active.detach()], dim=-1).to(gate_up_TF.dtype)
    quantize = column_scale_F is not None
    output = None
    if again:
        output = active.detach().to(gate_up_TF.dtype) * up.to(gate_up_TF.dtype)
    return _operand(both, quantize=quantize, keep=keep, column_scale_D=column_scale_F), output


def join_rotated(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor
) -> Tensor:
    """Lays the gradients of query, key and value side by side, turned back: [T, heads, width]."""
    joined = torch.cat([q_THK, k_THK, v_THK], dim=1)
    turned = q_THK.shape[1] + k_THK.shape[1]
    rotate_(joined, cos_TK, sin_TK, num_heads=turned, inverse=True)
    return joined


def quantize_rows(
    x_TD: Tensor, *, column_scale_D: Tensor | None = None, channels_C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds each row to FP8 (e4m3) with its own scale.

    Args:
        x_TD: [T, D].
        column_scale_D: Multiplied in first (a weight's row scales, in the backward product).
        channels_C: int32 [C]. Behind the row come what rounding took from these channels, and
            these channels once more: FP8 is then [T, D + 2C].

    Returns:
        FP8 [T, D] and float32 [T, 1] scales: x is about values * scale.
    """
    x = x_TD.float() if column_scale_D is None else x_TD.float() * column_scale_D
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    scaled = (x / scale).clamp(-FP8_MAX, FP8_MAX)
    values = scaled.to(torch.float8_e4m3fn)
    if channels_C is None:
        return values, scale
    exact = scaled[:, channels_C.long()]
    high = exact.to(torch.float8_e4m3fn)
    low = (exact - high.float()).to(torch.float8_e4m3fn)
    parts = [part.view(torch.uint8) for part in (values, low, high)]
    return torch.cat(parts, dim=1).view(torch.float8_e4m3fn), scale

"""A frozen weight in FP8, with the channels of its input that rounding hurts most held twice.

FP8 (e4m3) keeps four bits of a number, so an input channel is off in proportion to its size, and in
language models a few channels are tens of times larger than the others. Those come with what
rounding took from them: x[C] is about hi + lo, both FP8, and so is the weight's column. The
products hi*hi, lo*hi and hi*lo stand side by side along the summed dimension of one matrix product;
what is left of these channels' error is the square of a rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from vistune.models.fused.torch_ops import Operand

CHANNELS = 64
"""Channels of an input held twice: 2 * 64 columns are one more block of the matrix product."""


def num_rounded(num_layers: int) -> int:
    """Returns how many of a decoder's layers, from the first, are held in FP8.

    One in sixteen, at least one, is not. Rounding the last layers moves the loss more than rounding
    others, and the very last is computed at few positions.
    """
    return num_layers - max(1, round(num_layers / 16))


def num_channels(width: int) -> int:
    """Returns how many channels of an input of this width are held twice: a power of two.

    It is at most an eighth of them; FP8 products need a multiple of 16 columns.
    """
    most = min(CHANNELS, width // 8)
    return 0 if most < 8 else 1 << (most.bit_length() - 1)


def largest_channels(square_I: Tensor) -> Tensor | None:
    """Returns the places of the largest inputs, int32 [C] in rising order; None for narrow ones.

    Args:
        square_I: Mean squares of the input's channels.
    """
    count = num_channels(square_I.shape[0])
    if not count:
        return None
    return square_I.topk(count).indices.sort().values.to(torch.int32)


@dataclass(eq=False)
class Fp8Weight:
    """A weight rounded once, laid out for the product and for the gradient of its input.

    Args:
        values_OJ: e4m3 [out, in + 2C]: the weight; the columns of the channels held twice; what
            rounding took from those.
        values_IO: e4m3 [in, out].
        scale_O: float32 [out]; the weight is about values * scale.
        ones_I: float32 [1, in].
        dtype: The model's own format.
        channels_C: int32 [C], the channels held twice, or None.
    """

    values_OJ: Tensor
    values_IO: Tensor
    scale_O: Tensor
    ones_I: Tensor
    dtype: torch.dtype
    channels_C: Tensor | None = None

    @classmethod
    def of(cls, weight_OI: Tensor, channels_C: Tensor | None, ops: ModuleType) -> Fp8Weight:
        """Rounds a weight; both products use the same rounded numbers.

        So the backward pass is the gradient of the forward pass, but for what the channels held
        twice get back there.

        Args:
            weight_OI: [out, in].
            channels_C: int32 [C], or None.
            ops: The elementwise kernels.
        """
        values_OI, scale_O1 = ops.quantize_rows(weight_OI)
        values_OJ = values_OI
        if channels_C is not None:
            index = channels_C.long()
            high = values_OI.view(torch.uint8)[:, index].view(values_OI.dtype)
            low = (weight_OI[:, index].float() / scale_O1 - high.float()).to(high.dtype)
            parts = [part.view(torch.uint8) for part in (values_OI, high, low)]
            values_OJ = torch.cat(parts, dim=1).view(values_OI.dtype)
        values_IO = values_OI.t().contiguous()
        ones_I = torch.ones(1, values_IO.shape[0], device=values_IO.device)
        return cls(
            values_OJ, values_IO, scale_O1.flatten().contiguous(), ones_I, weight_OI.dtype,
            channels_C,
        )  # fmt: skip

    def product(self, x: Operand, ops: ModuleType) -> Tensor:
        """Returns x W^T, [T, out], for an input in any of its forms."""
        if x.fp8 is None:
            assert x.plain is not None
            x = Operand(None, *ops.quantize_rows(x.plain, channels_C=self.channels_C))
        assert x.fp8 is not None and x.scale is not None
        return scaled_product(x.fp8, x.scale, self.values_OJ, self.scale_O[None], self.dtype)

    def input_gradient(self, grad: Operand, ops: ModuleType) -> Tensor:
        """Returns dy W, [T, in]; an FP8 form of the gradient has `scale_O` folded in."""
        if grad.fp8 is None:
            assert grad.plain is not None
            grad = Operand(None, *ops.quantize_rows(grad.plain, column_scale_D=self.scale_O))
        assert grad.fp8 is not None and grad.scale is not None
        return scaled_product(grad.fp8, grad.scale, self.values_IO, self.ones_I, self.dtype)


def scaled_product(
    a_TK: Tensor, scale_T1: Tensor, b_NK: Tensor, scale_1N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns (a * scale) (b * scale)^T, [T, N] in `dtype`, of two e4m3 matrices."""
    found: Tensor = torch._scaled_mm(
        a_TK, b_NK.t(), scale_a=scale_T1, scale_b=scale_1N, out_dtype=dtype, use_fast_accum=True
    )
    return found


class Fp8Linear(nn.Module):
    """Some rows of an FP8 weight as a layer by itself, for generation.

    It stands where the frozen linear layer stood, holds no memory of its own and has no backward
    pass: training goes through the projection.

    Args:
        weight: The weight, perhaps of several layers.
        bias_O: All of its bias, or None.
        start: First output row.
        stop: One past the last output row.
        ops: The elementwise kernels.
    """

    def __init__(
        self, weight: Fp8Weight, bias_O: Tensor | None, start: int, stop: int, ops: ModuleType
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.values_IO.shape[0], stop - start
        self.values_OJ = weight.values_OJ[start:stop]
        self.scale_1O = weight.scale_O[None, start:stop]
        self.bias_O = None if bias_O is None else bias_O[start:stop]
        self.channels_C, self.dtype, self.ops = weight.channels_C, weight.dtype, ops

    def forward(self, x: Tensor) -> Tensor:
        """Applies the map to [..., in]."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise AssertionError("an FP8 layer by itself has no backward pass")
        flat_TI = x.reshape(-1, self.in_features).to(self.dtype)
        fp8, scale = self.ops.quantize_rows(flat_TI, channels_C=self.channels_C)
        y = scaled_product(fp8, scale, self.values_OJ, self.scale_1O, self.dtype)
        y = y if self.bias_O is None else y.add_(self.bias_O)
        return y.view(*x.shape[:-1], self.out_features)

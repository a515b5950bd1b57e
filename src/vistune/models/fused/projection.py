"""A frozen linear map, whole or several merged into one product, with optional LoRA adapters.

The base weight has no gradient. It is held once in the model's own format, or as FP8 in the two
layouts the forward and the input-gradient product read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from vistune.models.fused.torch_ops import Operand


@dataclass
class Adapter:
    """One LoRA adapter on the output rows `start` to `stop` of a projection.

    Args:
        down_RI: The factor A, [rank, in].
        up_OR: The factor B, [stop - start, rank].
        scale: alpha / rank, or as the adapter defines it.
        start: First output row.
        stop: One past the last output row.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    start: int
    stop: int


@dataclass(eq=False)
class Projection:
    """y = x W^T + b, and the adapters' share of it.

    Args:
        weight_OI: [out, in], or None once it is held in FP8.
        bias_O: [out] or None.
        adapters: In output order, not overlapping.
    """

    weight_OI: Tensor | None
    bias_O: Tensor | None = None
    adapters: Sequence[Adapter] = ()
    fp8_OI: Tensor | None = field(default=None, init=False)
    fp8_IO: Tensor | None = field(default=None, init=False)
    scale_O: Tensor | None = field(default=None, init=False)
    ones_I: Tensor | None = field(default=None, init=False)
    dtype: torch.dtype = field(default=torch.bfloat16, init=False)

    def to_fp8(self, ops: ModuleType) -> None:
        """Replaces the weight by its FP8 form: rounded once, laid out twice.

        Both products use the same rounded numbers, so that the backward pass is the gradient of
        the forward pass; the row scales are folded into the output gradient before it is rounded.
        """
        assert self.weight_OI is not None
        self.dtype = self.weight_OI.dtype
        self.fp8_OI, scale = ops.quantize_rows(self.weight_OI)
        self.scale_O = scale.flatten().contiguous()
        self.fp8_IO = self.fp8_OI.t().contiguous()
        self.ones_I = torch.ones(1, self.fp8_IO.shape[0], device=self.scale_O.device)
        self.weight_OI = None

    def split(self, at: int) -> tuple[Projection, Projection]:
        """Returns the map's first `at` outputs and the others as two maps over the same storage.

        The transposed FP8 layout cannot be shared by rows of outputs, so that part is copied.
        """
        halves = []
        for start, stop in ((0, at), (at, self.num_outputs)):
            bias = None if self.bias_O is None else self.bias_O[start:stop]
            adapters = tuple(
                replace(a, start=a.start - start, stop=a.stop - start)
                for a in self.adapters
                if start <= a.start and a.stop <= stop
            )
            weight = None if self.weight_OI is None else self.weight_OI[start:stop]
            half = Projection(weight, bias, adapters)
            half.dtype, half.ones_I = self.dtype, self.ones_I
            if self.fp8_OI is not None and self.fp8_IO is not None and self.scale_O is not None:
                half.fp8_OI, half.scale_O = self.fp8_OI[start:stop], self.scale_O[start:stop]
                half.fp8_IO = self.fp8_IO[:, start:stop].contiguous()
            halves.append(half)
        assert sum(len(half.adapters) for half in halves) == len(self.adapters)
        return halves[0], halves[1]

    @property
    def num_outputs(self) -> int:
        """Width of the result."""
        held = self.fp8_OI if self.weight_OI is None else self.weight_OI
        assert held is not None
        return held.shape[0]

    @property
    def is_fp8(self) -> bool:
        """Whether the products read FP8."""
        return self.weight_OI is None

    @property
    def reads_plain(self) -> bool:
        """Whether something here reads the activations in the model's own format."""
        return not self.is_fp8 or bool(self.adapters)

    def forward(
        self, x: Operand, ops: ModuleType, *, residual_TO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Applies the map.

        Args:
            x: [T, in].
            ops: The elementwise kernels.
            residual_TO: Added to the result.

        Returns:
            [T, out], and the adapters' inner values [T, sum of ranks] for the backward pass.
        """
        y = self._product(x, ops, residual_TO)
        if not self.adapters:
            return y, None
        assert x.plain is not None
        lowrank = x.plain @ self._downs(x.plain.dtype).t()
        at = 0
        for adapter in self.adapters:
            rank = adapter.down_RI.shape[0]
            y[:, adapter.start : adapter.stop].addmm_(
                lowrank[:, at : at + rank], adapter.up_OR.to(y.dtype).t(), alpha=adapter.scale
            )
            at += rank
        return y, lowrank

    def _downs(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([adapter.down_RI.to(dtype) for adapter in self.adapters])

    def _product(self, x: Operand, ops: ModuleType, residual_TO: Tensor | None) -> Tensor:
        if self.weight_OI is None:
            assert self.fp8_OI is not None and self.scale_O is not None
            fp8, scale = _fp8(x) if x.fp8 is not None else ops.quantize_rows(x.plain)
            dtype = self.dtype if x.plain is None else x.plain.dtype
            y = torch._scaled_mm(
                fp8, self.fp8_OI.t(), scale_a=scale, scale_b=self.scale_O[None],
                out_dtype=dtype, use_fast_accum=True,
            )  # fmt: skip
            y = y if residual_TO is None else y.add_(residual_TO)
        elif residual_TO is not None:
            y = torch.addmm(residual_TO, _plain(x), self.weight_OI.t())
        else:
            y = _plain(x) @ self.weight_OI.t()
        return y if self.bias_O is None else y.add_(self.bias_O)

    def input_gradient(self, grad: Operand, ops: ModuleType) -> Tensor:
        """Returns the gradient of the input through the base weight alone.

        Args:
            grad: Gradient of the output [T, out]; an FP8 form has `scale_O` folded in.
            ops: The elementwise kernels.
        """
        if self.weight_OI is not None:
            return _plain(grad) @ self.weight_OI
        assert self.fp8_IO is not None and self.ones_I is not None
        if grad.fp8 is not None:
            fp8, scale = _fp8(grad)
        else:
            fp8, scale = ops.quantize_rows(_plain(grad), column_scale_D=self.scale_O)
        dx: Tensor = torch._scaled_mm(
            fp8, self.fp8_IO.t(), scale_a=scale, scale_b=self.ones_I,
            out_dtype=self.dtype, use_fast_accum=True,
        )  # fmt: skip
        return dx

    def backward(self, grad: Operand, ops: ModuleType) -> tuple[Tensor, Tensor | None]:
        """Gradient of the input.

        Args:
            grad: Gradient of the output [T, out].
            ops: The elementwise kernels.

        Returns:
            [T, in], and the gradient of the adapters' inner values [T, sum of ranks].
        """
        dx = self.input_gradient(grad, ops)
        if not self.adapters:
            return dx, None
        grad_TO = _plain(grad)
        inner = [
            (grad_TO[:, a.start : a.stop] @ a.up_OR.to(grad_TO.dtype)).mul_(a.scale)
            for a in self.adapters
        ]
        inner_TR = torch.cat(inner, dim=1) if len(inner) > 1 else inner[0]
        dx.addmm_(inner_TR, self._downs(dx.dtype))
        return dx, inner_TR

    def adapter_gradients(
        self,
        grad: Operand,
        inner_TR: Tensor | None,
        x_TI: Tensor | None,
        lowrank_TR: Tensor | None,
    ) -> list[Tensor]:
        """Gradients of A and B of every adapter, in order; empty without adapters.

        Args:
            grad: Gradient of the output [T, out].
            inner_TR: From `backward`.
            x_TI: The forward input.
            lowrank_TR: From `forward`.
        """
        if not self.adapters:
            return []
        assert inner_TR is not None and x_TI is not None and lowrank_TR is not None
        grad_TO = _plain(grad)
        ranks = [a.down_RI.shape[0] for a in self.adapters]
        downs = torch.split(inner_TR.t() @ x_TI, ranks)
        lowranks = torch.split(lowrank_TR, ranks, dim=1)
        grads: list[Tensor] = []
        for adapter, down, lowrank in zip(self.adapters, downs, lowranks, strict=True):
            up = (grad_TO[:, adapter.start : adapter.stop].t() @ lowrank).mul_(adapter.scale)
            grads += [down.to(adapter.down_RI.dtype), up.to(adapter.up_OR.dtype)]
        return grads


class Fp8Linear(nn.Module):
    """One of the maps merged into an FP8 projection, by itself, for generation.

    It stands where the frozen linear layer stood, holds no memory of its own and has no backward
    pass: training goes through the projection.

    Args:
        projection: The projection, already in FP8.
        start: First output row.
        stop: One past the last output row.
        ops: The elementwise kernels.
    """

    def __init__(self, projection: Projection, start: int, stop: int, ops: ModuleType) -> None:
        super().__init__()
        assert projection.fp8_OI is not None and projection.scale_O is not None
        self.in_features, self.out_features = projection.fp8_OI.shape[1], stop - start
        self.fp8_OI = projection.fp8_OI[start:stop]
        self.scale_1O = projection.scale_O[None, start:stop]
        self.bias_O = None if projection.bias_O is None else projection.bias_O[start:stop]
        self.dtype, self.ops = projection.dtype, ops

    def forward(self, x: Tensor) -> Tensor:
        """Applies the map to [..., in]."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise AssertionError("an FP8 layer by itself has no backward pass")
        fp8, scale = self.ops.quantize_rows(x.reshape(-1, self.in_features).to(self.dtype))
        y = torch._scaled_mm(
            fp8, self.fp8_OI.t(), scale_a=scale, scale_b=self.scale_1O,
            out_dtype=self.dtype, use_fast_accum=True,
        )  # fmt: skip
        y = y if self.bias_O is None else y.add_(self.bias_O)
        return y.view(*x.shape[:-1], self.out_features)


def _fp8(x: Operand) -> tuple[Tensor, Tensor]:
    assert x.fp8 is not None and x.scale is not None
    return x.fp8, x.scale


def _plain(x: Operand) -> Tensor:
    assert x.plain is not None
    return x.plain

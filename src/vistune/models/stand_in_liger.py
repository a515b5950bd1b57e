"""liger-kernel's norms and gates: functions that keep and make what they do, and compute nothing.

For passes without storage over a model that a run puts them into (`models.kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistune.models.kernels import Casting, KernelModel, has_liger, install_kernels
from vistune.recipe import TrainConfig


def stand_in_liger(model: KernelModel, train: TrainConfig, *, kind: str) -> None:
    """Has norms and gates of a decoder that does not run fused keep what liger-kernel's keep.

    Args:
        model: Of tensors without storage, adapters in place; changed in place where a run would.
        train: Which kernels are asked for.
        kind: Kind of the device that is planned for; liger-kernel is taken for CUDA's where it is
            installed here.

    Raises:
        ModelError: The kernels are asked for by name, and there is nothing to replace.
    """
    if train.kernels == "liger" or (train.kernels == "auto" and kind == "cuda" and has_liger()):
        install_kernels(
            model, wanted=train.kernels, fused=False, device=torch.device(kind), ops=CountedOps(),
            trial=False,
        )  # fmt: skip


class CountedOps:
    """liger-kernel's functions, as `models.kernels` asks for them."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting
    ) -> Tensor:
        """Keeps its input and one fp32 number a row."""
        out: Tensor = _Norm.apply(x, weight)  # type: ignore[no-untyped-call]
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Keeps both inputs, which their gradients replace."""
        out: Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
        return out

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `silu_mul`."""
        return self.silu_mul(gate, up)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return torch.empty_like(x), of_weight


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return tuple(tensor.view(tensor.shape) for tensor in saved)

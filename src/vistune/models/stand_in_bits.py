"""Linear layers held in 8 bits, as bitsandbytes computes them: what they keep and make.

For passes without storage over a model whose weights are not rounded. A product takes a 16-bit copy
of its input and an 8-bit one, gives 32-bit sums and two 16-bit results; and it holds its input, not
as autograd holds tensors but on its node of the graph: no layer that is computed again lets go of
it, and it stays until the whole graph does (bitsandbytes 0.50, `MatMul8bitLt`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models.contract import TunableModel
from vistune.models.kept import kept_bytes
from vistune.models.tune.quantize import QUANTISED_ROLES, frozen_linear
from vistune.recipe import TuneConfig


class HeldInputs:
    """The inputs that 8-bit products of a pass held."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] | None = None

    def add(self, tensor: Tensor) -> None:
        """Takes note of an input, while they are asked for."""
        if self._storages is not None:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def slope(
        self,
        model: nn.Module,
        run: Callable[[int], Tensor],
        *,
        dtype: torch.dtype,
        at: tuple[int, int],
    ) -> float:
        """Returns their bytes for each unit of size, each storage once; see `kept.kept_slope`.

        Args:
            model: The model whose layers stand in.
            run: The pass over so many units.
            dtype: Format of the arithmetic.
            at: Two sizes.
        """
        few, many = (self._bytes(model, run, size, dtype=dtype) for size in at)
        return (many - few) / (at[1] - at[0])

    def _bytes(
        self, model: nn.Module, run: Callable[[int], Tensor], size: int, *, dtype: torch.dtype
    ) -> int:
        self._storages = {}
        kept_bytes(model, run, size, dtype=dtype)
        total = sum(int(storage.nbytes()) for storage in self._storages.values())
        self._storages = None
        return total


def stand_in_int8(model: TunableModel, tune: TuneConfig) -> HeldInputs | None:
    """Has layers that a run holds in 8 bits keep and make what those do; they compute nothing.

    Modules and weights stay what they are, and are counted as before.

    Args:
        model: Of tensors without storage, adapters in place; changed in place.
        tune: What trains.

    Returns:
        What their products hold, or None where no layer is held so.
    """
    held, found = HeldInputs(), False
    for role in QUANTISED_ROLES:
        if tune.held_format(role) != "int8":
            continue
        for _, linear in frozen_linear(model, role):
            # In the place of the method: weights are counted by the class of their module.
            vars(linear)["forward"] = partial(_multiply, linear, held)
            found = True
    return held if found else None


def _multiply(linear: nn.Linear, held: HeldInputs, x: Tensor) -> Tensor:
    out: Tensor = _Int8.apply(x.flatten(0, -2), linear.weight.shape[0], held)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Int8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, held: HeldInputs) -> Tensor:
        shape, rounded = (*x.shape[:-1], width), x.new_empty(x.shape, dtype=torch.int8)
        x.new_empty(x.shape, dtype=torch.float16)
        sums = x.new_empty(shape, dtype=torch.int32)
        half = x.new_empty(shape, dtype=torch.float16)
        out = half if x.dtype is torch.float16 else x.new_empty(shape)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        if ctx.needs_input_grad[0]:
            ctx.held = x
            ctx.save_for_backward(x)
            held.add(x)
        del rounded, sums
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().to(ctx.dtype)
        return grad.new_empty(ctx.shape), None, None

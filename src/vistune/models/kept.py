"""Counts what autograd keeps of a forward pass, on tensors without storage: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


def kept_slope(
    model: nn.Module,
    run: Callable[[int], object],
    *,
    dtype: torch.dtype,
    at: tuple[int, int],
) -> float:
    """Counts the bytes autograd keeps for each unit of size.

    What does not grow with the size (weights, their casts) drops out of the difference.

    Args:
        model: See `kept_bytes`.
        run: See `kept_bytes`.
        dtype: Format of the arithmetic.
        at: Two sizes.
    """
    few, many = (kept_bytes(model, run, size, dtype=dtype) for size in at)
    return (many - few) / (at[1] - at[0])


class _Run(nn.Module):
    """A function of a model as a module, so that the model's weights can be stood in for."""

    def __init__(self, model: nn.Module, run: Callable[[int], object]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, size: int) -> object:
        return self.run(size)


def kept_bytes(
    model: nn.Module, run: Callable[[int], object], size: int, *, dtype: torch.dtype
) -> int:
    """Counts the bytes autograd keeps in a forward pass, each storage once.

    Args:
        model: On the meta device, or real; its weights are stood in for by tensors without storage.
        run: The pass over `size` units; it must use `model`.
        size: The units.
        dtype: Format of the arithmetic.
    """
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    half = dtype is torch.bfloat16
    wrapped = _Run(model, run)
    with FakeTensorMode():
        named = (*wrapped.named_parameters(), *wrapped.named_buffers())
        tensors = {
            name: torch.empty(
                tuple(t.shape), dtype=t.dtype, device="cpu", requires_grad=t.requires_grad
            )
            for name, t in named
        }
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
            torch.enable_grad(),
        ):
            result = functional_call(wrapped, tensors, (size,))
        total = sum(int(storage.nbytes()) for storage in storages.values())
        del result
    return total

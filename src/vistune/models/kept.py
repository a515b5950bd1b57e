"""Counts what a pass keeps and what it needs at most, on tensors without storage.

Nothing is computed: every operation only says which tensors it would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE_OF = torch.ops.prim.device.default
"""What a tensor without storage is asked for before most operations; it makes nothing."""


def kept_slope(
    model: nn.Module,
    run: Callable[[int], Tensor],
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


def peak_slope(
    model: nn.Module,
    run: Callable[[int], Tensor],
    *,
    dtype: torch.dtype,
    at: tuple[int, int],
) -> float:
    """Counts the most bytes a pass and its backward pass hold at once, for each unit of size.

    Args:
        model: See `kept_bytes`.
        run: See `kept_bytes`.
        dtype: Format of the arithmetic.
        at: Two sizes; large, or what weights cast on the way need hides what the units need.
    """
    few, many = (peak_bytes(model, run, size, dtype=dtype) for size in at)
    return (many - few) / (at[1] - at[0])


class _Run(nn.Module):
    """A function of a model as a module, so that the model's weights can be stood in for."""

    def __init__(self, model: nn.Module, run: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, size: int) -> Tensor:
        return self.run(size)


def kept_bytes(
    model: nn.Module, run: Callable[[int], Tensor], size: int, *, dtype: torch.dtype
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

    with _stood_in(model, run, dtype=dtype) as call:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call(size)
        total = sum(int(storage.nbytes()) for storage in storages.values())
        del result
    return total


def peak_bytes(
    model: nn.Module, run: Callable[[int], Tensor], size: int, *, dtype: torch.dtype
) -> int:
    """Counts the most bytes that exist at once in a forward pass and its backward pass.

    Args:
        model: See `kept_bytes`; gradients of its weights count too.
        run: See `kept_bytes`; what it returns starts the backward pass, where it has a gradient.
        size: The units.
        dtype: Format of the arithmetic.
    """
    with _stood_in(model, run, dtype=dtype) as call, LiveBytes() as live:
        result = call(size)
        if result.requires_grad:
            result.backward(torch.empty_like(result))  # type: ignore[no-untyped-call]
        most: int = live.most
    return most


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which storages exist, and remembers the most bytes they had at once.

    Args:
        beside: Tensors that are not counted; the list may grow.
    """

    def __init__(self, beside: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._most_of_lap = 0
        self._now = 0
        self._alive: dict[int, tuple[Any, int]] = {}
        self._beside = beside
        self._num_beside = 0
        self._left_out: set[int] = set()

    def now(self) -> int:
        """Returns the bytes that exist."""
        self._forget_the_dead()
        return self._now

    def restart(self) -> int:
        """Returns the bytes that exist, and remembers the most from now on alone."""
        self.most = self._most_of_lap = self.now()
        return self.most

    def lap(self) -> tuple[int, int]:
        """Returns the most bytes since the last lap, and those that exist; `most` goes on."""
        most, self._most_of_lap = self._most_of_lap, self.now()
        return most, self._now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is DEVICE_OF:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        if self._now > self._most_of_lap:
            self._forget_the_dead()
            self._most_of_lap = max(self._most_of_lap, self._now)
            self.most = max(self.most, self._now)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        for other in self._beside[self._num_beside :]:
            self._left_out.add(other.untyped_storage()._cdata)
        self._num_beside = len(self._beside)
        if storage._cdata in self._left_out:
            return
        known = self._alive.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        num_bytes = int(storage.nbytes())
        self._now += num_bytes - (0 if known is None else known[1])
        self._alive[storage._cdata] = (StorageWeakRef(storage), num_bytes)  # type: ignore[no-untyped-call]

    def _forget_the_dead(self) -> None:
        dead = [key for key, (reference, _) in self._alive.items() if reference.expired()]
        for key in dead:
            self._now -= self._alive.pop(key)[1]


@contextmanager
def as_on_accelerators(model: nn.Module) -> Iterator[None]:
    """Has modules that make other tensors on a CPU than on accelerators make those.

    Layer norms in fp32, where autocast is on: a module may turn it off for norms that make no fp32
    tensors. Dropout in one kernel, which keeps a byte for each number and not the numbers that it
    multiplies by. It must last to the end of the backward pass, for layers computed again.

    Args:
        model: Its modules are changed for so long.
    """
    changed = []
    for module in model.modules():
        other = _OTHERS.get(type(module))
        if other is not None and "forward" not in vars(module):
            vars(module)["forward"] = partial(other, module)
            changed.append(module)
    try:
        with _LayerNorms():
            yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    if module.inplace or not module.training or not 0 < module.p < 1:
        return nn.Dropout.forward(module, x)
    return torch.native_dropout(x, module.p, train=True)[0]


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return nn.LayerNorm.forward(module, x)
    weight, bias = (None if t is None else t.float() for t in (module.weight, module.bias))
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


_OTHERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Dropout: _dropout,
    nn.LayerNorm: _layer_norm,
}


class _LayerNorms(TorchFunctionMode):
    """The same for norms of other classes, as far as the forward pass: it is not on in backward."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _stood_in(
    model: nn.Module, run: Callable[[int], Tensor], *, dtype: torch.dtype
) -> Iterator[Callable[[int], Tensor]]:
    """Gives the function of a model whose weights are tensors without storage."""
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

        def call(size: int) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                out: Tensor = functional_call(wrapped, tensors, (size,))
            return out

        with torch.enable_grad(), as_on_accelerators(model):
            yield call

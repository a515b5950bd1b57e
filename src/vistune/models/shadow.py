"""Passes of a whole model whose integers are real and whose numbers have no storage.

A model that reads shapes of images, boundaries of samples and places of image tokens off its
inputs runs as it is; the arithmetic only says which tensors it would make. What exists at once is
followed. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vistune.models.alike import Alike
from vistune.models.kept import DEVICE_OF, LiveBytes, as_on_accelerators

_SMALL = 4096
"""Numbers up to which what is made of nothing (tables, ranges) is computed."""
_aten = torch.ops.aten


@dataclass(frozen=True)
class PassBytes:
    """Bytes of tensors made in a pass, inputs and weights left out.

    Args:
        kept: Alive when the forward pass has ended.
        forward: Most at once in the forward pass.
        backward: Most at once in the backward pass, gradients of weights let go as soon as they
            are there.
    """

    kept: int
    forward: int
    backward: int

    def __sub__(self, other: PassBytes) -> PassBytes:
        return PassBytes(
            self.kept - other.kept, self.forward - other.forward, self.backward - other.backward
        )


def pass_bytes(
    model: nn.Module,
    run: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    *,
    dtype: torch.dtype,
    backward: bool = True,
    alike: Alike | None = None,
) -> PassBytes:
    """Follows one pass over a model, and its backward pass.

    Args:
        model: On the meta device, or real; its weights are stood in for.
        run: The pass; it must use `model`.
        arguments: Of `run`; tensors of numbers are stood in for, so that the meta device will do.
        dtype: Format of the arithmetic.
        backward: Whether there is a backward pass, from what `run` returns.
        alike: Blocks of which not all need to run.

    Raises:
        NotAlike: They do need to.
    """
    beside: list[Tensor] = []

    def both(*given: Any) -> PassBytes:
        short = nullcontext if alike is None else alike.shortened
        with LiveBytes(beside=beside) as live, short(live):
            with _arithmetic(dtype):
                result = run(*given)
            forward, kept = live.most, live.restart()
            if backward and result.requires_grad:
                result.backward(torch.empty_like(result))  # type: ignore[no-untyped-call]
            del result
            return PassBytes(kept, forward, live.most)

    with _shadow(model, both, beside) as call, as_on_accelerators(model):
        found: PassBytes = call(*arguments)
    return found


def shadow_of(model: nn.Module, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Returns what a pass in fp32 returns, its numbers without storage.

    Args:
        model: See `pass_bytes`.
        run: See `pass_bytes`.
        arguments: See `pass_bytes`.
    """
    with _shadow(model, run, []) as call:
        return call(*arguments)


@contextmanager
def _arithmetic(dtype: torch.dtype) -> Iterator[None]:
    half = dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        yield


class _RealIntegers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes what follows from integers alone, and lets all else be without storage."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls: to ask it costs as much as a product
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            args = _without_masks(func, args)
            with self._fake:
                made = func(*args, **kwargs)
            # Integers that follow from numbers: no pixel is zero.
            return torch.zeros(made.shape, dtype=made.dtype) if _is_count(func, made) else made
        if not tensors:
            with self._fake:
                made = func(*args, **kwargs)
            if isinstance(made, Tensor) and made.is_floating_point() and made.numel() > _SMALL:
                return made
        return func(*args, **kwargs)


def _is_count(func: Any, made: Any) -> bool:
    """Whether a few integers were worked out from numbers: how many pixels are zero, say."""
    if not isinstance(made, Tensor) or made.is_floating_point() or made.numel() > _SMALL:
        return False
    return not func._schema.is_mutable and not any(r.alias_info for r in func._schema.returns)


def _without_masks(func: Any, args: Any) -> Any:
    """Puts places where a mask chooses: how many there are must be known."""
    if func not in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        return args
    source, places, *rest = args
    found: list[Tensor | None] = []
    for place in places:
        if place is None or place.dtype is not torch.bool:
            found.append(place)
        else:
            found += list(place.nonzero().unbind(1))
    return source, found, *rest


class _Run(nn.Module):
    """A function of a model as a module, so that the model's weights can be stood in for."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *arguments: Any) -> Any:
        return self.run(*arguments)


@contextmanager
def _shadow(
    model: nn.Module, run: Callable[..., Any], beside: list[Tensor]
) -> Iterator[Callable[..., Any]]:
    """Gives a function whose weights and arguments are stood in for; `beside` is told of both."""
    wrapped = _Run(model, run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        named = {**dict(wrapped.named_parameters()), **dict(wrapped.named_buffers())}
        held = {name: _stand_in(tensor) for name, tensor in named.items()}
    for tensor in held.values():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
    beside.extend(held.values())

    def call(*arguments: Any) -> Any:
        with fake:
            arguments = tree_map_only(Tensor, _stand_in_for_numbers, arguments)
        beside.extend(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        # Layers that are computed again look for their weights in the backward pass too.
        return functional_call(wrapped, held, arguments)

    with torch.enable_grad(), _RealIntegers(fake):
        yield call


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _stand_in(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)


def _stand_in_for_numbers(tensor: Tensor) -> Tensor:
    return _stand_in(tensor) if tensor.is_floating_point() else tensor

"""Blocks that are alike are followed once: the others take the room that one of them took.

For passes without storage (`models.shadow`) over towers of dozens of blocks. Blocks are alike whose
modules and arguments are; arguments beside the first are taken as made once for all blocks. Of each
kind the first two and the last run: the second says what a forward pass keeps and needs at most,
the last, which is the first to come back, what a backward pass needs. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from vistune import _compat
from vistune.models.kept import LiveBytes

_WORTH_IT = 4
"""Blocks of a kind from which on some of them need not run."""
_SMALL = 4096
"""Integers up to which their values are compared: boundaries of images and windows."""


class NotAlike(Exception):  # noqa: N818
    """Blocks that were taken for alike are not: each has to run."""


@dataclass
class _Took:
    """What blocks of a kind took.

    Args:
        dtype: Of the result, which is as large as the input.
        kept: Bytes kept beside the result and the input.
        keeps_input: Whether the input is kept.
        forward: Most bytes at once in a forward pass, beyond those at its start.
        backward: The same of a backward pass; None until there was one.
    """

    dtype: torch.dtype
    kept: int = 0
    keeps_input: bool = False
    forward: int = 0
    backward: int | None = 0


def kinds_of(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> tuple[Any, tuple[int, ...]]:
    """Runs a pass of which only shapes matter, through the first block of each kind.

    Args:
        blocks: Blocks that the pass goes through.
        run: The pass, its numbers without storage.

    Returns:
        What it returns, and for each block the number of its kind; none where the pass does not go
        through every block once, or a block does more than to replace its first argument.
    """
    kinds: dict[int, int] = {}
    seen: dict[Any, tuple[int, _Took]] = {}

    def call(index: int, forward: Callable[..., Any], hidden: Any, *args: Any, **more: Any) -> Any:
        kind = (_structure(blocks[index]), _given((hidden, args, more)))
        if index in kinds or _compat.recomputes_around_forward(blocks[index]):
            raise NotAlike
        if kind in seen:
            kinds[index], took = seen[kind]
            return _Room.apply(hidden, took)  # type: ignore[no-untyped-call]
        out = forward(hidden, *args, **more)
        _require_replaced(hidden, out)
        kinds[index] = len(seen)
        seen[kind] = kinds[index], _Took(out.dtype)
        return out

    try:
        with _taken_over(blocks, call):
            found = run()
    except NotAlike:
        return run(), ()
    return found, tuple(kinds[at] for at in range(len(blocks))) if len(kinds) == len(blocks) else ()


class Alike:
    """One pass over blocks of which some are alike.

    Args:
        blocks: The blocks.
        kinds: From `kinds_of`.
    """

    def __init__(self, blocks: Sequence[nn.Module], kinds: Sequence[int]) -> None:
        assert len(blocks) == len(kinds)
        self._blocks, self._kinds = blocks, kinds
        self._given: dict[int, Any] = {}
        self._took: dict[int, _Took] = {}
        self._input: tuple[_Took, StorageWeakRef] | None = None
        self._open: dict[int, tuple[int, int]] = {}

    @contextmanager
    def shortened(self, live: LiveBytes) -> Iterator[None]:
        """Lets blocks of known kinds take their room instead of running.

        Args:
            live: Follows the pass and its backward pass.

        Raises:
            NotAlike: On the way, if blocks turn out to differ.
        """
        with _taken_over(self._blocks, partial(self._call, live)):
            yield

    def _call(
        self,
        live: LiveBytes,
        index: int,
        forward: Callable[..., Any],
        hidden: Any,
        *args: Any,
        **more: Any,
    ) -> Any:
        if self._input is not None:  # by now nobody holds it but who keeps it
            took, storage = self._input
            took.keeps_input = not storage.expired()  # type: ignore[no-untyped-call]
            self._input = None
        kind = self._kinds[index]
        alike = [at for at, other in enumerate(self._kinds) if other == kind]
        if len(alike) < _WORTH_IT:
            return forward(hidden, *args, **more)
        given = _given((hidden, args, more))
        if self._given.setdefault(kind, given) != given:
            raise NotAlike
        if index == alike[0]:
            return forward(hidden, *args, **more)
        if index == alike[1]:
            return self._measured(live, kind, forward, hidden, *args, **more)
        if kind not in self._took:  # blocks run in another order
            raise NotAlike
        if index != alike[-1]:
            return _Room.apply(hidden, self._took[kind])  # type: ignore[no-untyped-call]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._end(live, kind))
        out = forward(hidden, *args, **more)
        if out.requires_grad:
            out.register_hook(lambda _: self._begin(live, kind))
        return out

    def _measured(
        self, live: LiveBytes, kind: int, forward: Callable[..., Any], hidden: Tensor, *args: Any,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        _, before = live.lap()
        out: Tensor = forward(hidden, *args, **more)
        most, now = live.lap()
        _require_replaced(hidden, out)
        if out.requires_grad != hidden.requires_grad:
            raise NotAlike
        own = int(out.untyped_storage().nbytes())
        self._took[kind] = _Took(
            dtype=out.dtype,
            kept=now - before - own,
            forward=most - before,
            backward=None,
        )
        self._input = self._took[kind], StorageWeakRef(hidden.untyped_storage())  # type: ignore[no-untyped-call]
        return out

    def _begin(self, live: LiveBytes, kind: int) -> None:
        now = self._lap(live)
        self._open[kind] = now, now

    def _end(self, live: LiveBytes, kind: int) -> None:
        self._lap(live)
        before, most = self._open.pop(kind)
        self._took[kind].backward = most - before

    def _lap(self, live: LiveBytes) -> int:
        most, now = live.lap()
        for kind, (before, until_now) in self._open.items():
            self._open[kind] = before, max(until_now, most)
        return now


class _Room(torch.autograd.Function):
    """Takes the room of a block, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, took: _Took) -> Tensor:
        ctx.took, ctx.dtype = took, hidden.dtype
        _bytes(hidden, took.forward)
        out = hidden.new_empty(hidden.shape, dtype=took.dtype)
        if hidden.requires_grad:
            ctx.kept = _bytes(hidden, took.kept)
            ctx.save_for_backward(*((hidden,) if took.keeps_input else ()))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.took.backward is None:
            raise NotAlike
        _bytes(grad, ctx.took.backward)
        ctx.kept = None
        return grad.new_empty(grad.shape, dtype=ctx.dtype), None


def _bytes(like: Tensor, number: int) -> Tensor:
    if number < 0:
        raise NotAlike
    return like.new_empty((number,), dtype=torch.uint8)


@contextmanager
def _taken_over(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Has `call(index, forward, ...)` run in place of the forward pass of each block.

    Hooks on blocks stay in force: towers collect the results of their blocks by them.
    """
    own = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(call, index, block.forward)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def _require_replaced(hidden: Any, out: Any) -> None:
    """Refuses a block that gives back anything but a new tensor of its input's shape."""
    if not isinstance(hidden, Tensor) or not isinstance(out, Tensor) or out.shape != hidden.shape:
        raise NotAlike
    if out.untyped_storage()._cdata == hidden.untyped_storage()._cdata:
        raise NotAlike


def _structure(block: nn.Module) -> Any:
    """Returns what of a block's modules and weights decides the room that it takes."""
    modules = tuple(
        (name, type(module), tuple(_plain(vars(module)))) for name, module in block.named_modules()
    )
    weights = tuple(
        (name, tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in (*block.named_parameters(), *block.named_buffers())
    )
    return modules, weights


def _plain(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, (bool, int, float, str)) and name != "layer_idx":
            yield name, value


def _given(arguments: Any) -> Any:
    """Returns what of a block's arguments decides the room that it takes."""
    return tuple(_told(leaf) for leaf in tree_leaves(arguments))


def _told(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, (bool, int, float, str)) else type(leaf)
    said = (tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
    is_known = not isinstance(leaf, FakeTensor) and not leaf.is_floating_point()
    return (*said, tuple(leaf.flatten().tolist())) if is_known and leaf.numel() <= _SMALL else said

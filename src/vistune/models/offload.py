"""Inputs of recomputed layers wait for the backward pass in the host's memory.

A recomputed layer keeps its input and nothing else. With long rows and many layers these inputs are
what fills a small card, and to copy one takes less time than to compute its layer. Whatever a layer
keeps that is not recomputed stays on the device: it is ten times as much, and to copy it would take
longer than to compute it again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vistune.device.transfer import Transfer

IN_FLIGHT = 2
"""Inputs on the device beside the one in use, in either direction."""


class _Moved:
    """One input on its way to the host or back."""

    def __init__(self, host: Tensor, source: Tensor, arrived: Any) -> None:
        self.host = host
        self.arrived = arrived
        self.here: Tensor | None = source
        """The input on the device: not yet let go, or fetched again."""
        self.ready: Any = None
        self.before: weakref.ref[_Moved] | None = None


class InputStore:
    """Moves the inputs of layers out in the forward pass and back in time for the backward pass.

    Args:
        device: Where the layers run. A CPU copies too, which is of use in tests alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._transfer = Transfer(device)
        self._leaving: deque[_Moved] = deque()
        self._last: weakref.ref[_Moved] | None = None

    @contextmanager
    def moving(self, input_: Tensor) -> Iterator[None]:
        """Within this, autograd keeps `input_` in the host's memory; other tensors stay.

        Args:
            input_: The layer's input.
        """
        # Autograd holds `pack` for as long as what was saved: it must not hold the input itself.
        address, shape = input_.data_ptr(), input_.shape

        def pack(tensor: Tensor) -> Tensor | _Moved:
            # Detached: a result that is saved with its graph would keep itself alive for ever.
            found = tensor.detach()
            same = found.data_ptr() == address and found.shape == shape
            return self._store(found) if same else found

        def unpack(packed: Tensor | _Moved) -> Tensor:
            return self._take(packed) if isinstance(packed, _Moved) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _store(self, source: Tensor) -> _Moved:
        host = self._transfer.host_empty(*source.shape, dtype=source.dtype)
        moved = _Moved(host, source, self._transfer.copy_out(source, host))
        moved.before, self._last = self._last, weakref.ref(moved)
        self._leaving.append(moved)
        while len(self._leaving) > IN_FLIGHT:
            self._let_go(self._leaving.popleft())
        return moved

    def _let_go(self, moved: _Moved) -> None:
        # The arithmetic waits, so the memory is free for what is queued after this.
        self._transfer.wait(moved.arrived)
        moved.here = None

    def _take(self, moved: _Moved) -> Tensor:
        if moved in self._leaving:
            self._leaving.remove(moved)
        if moved.here is None:
            self._fetch(moved)
        self._transfer.wait(moved.ready)
        found, moved.here, moved.ready = moved.here, None, None
        assert found is not None
        before = None if moved.before is None else moved.before()
        if before is not None and before.here is None:
            self._fetch(before)
        self._last = moved.before
        return found

    def _fetch(self, moved: _Moved) -> None:
        moved.here, moved.ready = self._transfer.copy_in(moved.host, after=moved.arrived)

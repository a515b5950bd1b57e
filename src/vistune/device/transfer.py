"""Copies between a device and the host that run beside the device's arithmetic.

On a CPU there is nothing to run beside: copies are plain, so that what uses them can be tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistune.errors import DeviceError


class Transfer:
    """Two streams, one to the host and one from it, over page-locked memory.

    Memory of the device stays in the order of its arithmetic: a tensor copied out is let go only
    once the arithmetic waits for the copy, and one copied in is made before the copy starts. So an
    allocator may use it again at once, however far the host runs ahead.

    Args:
        device: The device.

    Raises:
        DeviceError: The device and the host share their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_plain = device.type == "cpu"
        if device.type == "mps":
            raise DeviceError(
                "this device's memory is the host's: there is nowhere to move to",
                where="train.offload",
                got=str(device),
                fix="leave train.offload out",
            )
        if not self.is_plain:
            self._module: Any = torch.get_device_module(device)
            self._outward = self._module.Stream(device)
            self._inward = self._module.Stream(device)

    def host_empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns memory of the host that copies run fast from and to; not filled.

        Torch rounds page-locked memory up to a power of two.
        """
        return torch.empty(*shape, dtype=dtype, pin_memory=not self.is_plain)

    def copy_out(self, source: Tensor, host: Tensor) -> Any:
        """Copies to the host after the arithmetic queued so far.

        Args:
            source: On the device; hold it until the arithmetic waits for the copy.
            host: From `host_empty`.

        Returns:
            What to `wait` for; None where the copy is done.
        """
        if self.is_plain:
            host.copy_(source)
            return None
        self._outward.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._outward):
            host.copy_(source, non_blocking=True)
            return self._outward.record_event()

    def copy_in(self, host: Tensor, *, after: Any = None) -> tuple[Tensor, Any]:
        """Copies to the device after the arithmetic queued so far.

        Args:
            host: From `host_empty`.
            after: What `copy_out` returned for it.

        Returns:
            The copy, and what to `wait` for before reading it.
        """
        if self.is_plain:
            return host.clone(), None
        copy = torch.empty_like(host, device=self.device, pin_memory=False)
        self._inward.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._inward):
            if after is not None:
                self._inward.wait_event(after)
            copy.copy_(host, non_blocking=True)
            return copy, self._inward.record_event()

    def wait(self, event: Any) -> None:
        """Makes the arithmetic queued from now on wait for a copy; the host does not wait."""
        if event is not None:
            self._module.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Waits, on the host, until everything copied out has arrived."""
        if not self.is_plain:
            self._outward.synchronize()

"""Devices a run can be planned for without having one: their memory and matrix products a second.

Memory is what the driver leaves to programs, in GiB. Rates are dense 16-bit products: measured by
us where `is_measured`, else the maker's figure, of which about four fifths are reached. A rate we
do not know is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vistune.device import Device, nvidia_capability
from vistune.device.peak import free_memory_gib, measure_matmul_tflops
from vistune.registry import Registry

_REACHED_OF_DATA_SHEET = 0.8


@dataclass(frozen=True)
class KnownDevice:
    """A device as far as planning is concerned.

    Args:
        name: Its name.
        memory_gib: Memory for programs.
        tflops: 16-bit matrix products a second, or None.
        is_measured: Whether `tflops` was measured (else a maker's figure).
        kind: `cuda` (NVIDIA, ROCm, DCU), `npu` or `cpu`.
        has_bf16: Whether bf16 is computed in hardware.
        capability: NVIDIA's compute capability; None for devices of other makers.
    """

    name: str
    memory_gib: float
    tflops: float | None = None
    is_measured: bool = False
    kind: str = "cuda"
    has_bf16: bool = True
    capability: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The format `dtype: auto` takes there."""
        return torch.bfloat16 if self.has_bf16 else torch.float32

    @property
    def reached_tflops(self) -> float | None:
        """What large matrix products reach."""
        if self.tflops is None or self.is_measured:
            return self.tflops
        return _REACHED_OF_DATA_SHEET * self.tflops


KNOWN_DEVICES: Registry[KnownDevice] = Registry("device")
for _device in (
    KnownDevice("h200", 139.7, 790.0, is_measured=True, capability=(9, 0)),
    KnownDevice("h100", 79.1, 989.0, capability=(9, 0)),
    KnownDevice("a100-80", 79.2, 312.0, capability=(8, 0)),
    KnownDevice("a100-40", 39.4, 312.0, capability=(8, 0)),
    KnownDevice("l40s", 44.4, 362.0, capability=(8, 9)),
    KnownDevice("a10", 22.0, 125.0, capability=(8, 6)),
    KnownDevice("4090", 23.5, 165.0, capability=(8, 9)),
    KnownDevice("3090", 23.6, 71.0, capability=(8, 6)),
    KnownDevice("t4", 14.6, None, has_bf16=False, capability=(7, 5)),
    KnownDevice("dcu-16", 16.0, None, has_bf16=False),
    KnownDevice("dcu-32", 32.0, None, has_bf16=False),
    KnownDevice("dcu-64", 64.0, None),
    KnownDevice("npu-32", 30.0, None, kind="npu"),
    KnownDevice("npu-64", 61.0, None, kind="npu"),
):
    KNOWN_DEVICES.register(_device.name)(_device)


def present_device(device: Device) -> KnownDevice:
    """Returns the device of this process with its free memory and its measured rate."""
    rate = measure_matmul_tflops(device)
    has_bf16 = device.dtype is torch.bfloat16
    return KnownDevice(
        device.name,
        free_memory_gib(device),
        rate,
        rate is not None,
        device.kind,
        has_bf16,
        nvidia_capability(device.torch_device),
    )

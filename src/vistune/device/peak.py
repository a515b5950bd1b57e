"""A device's two ceilings, asked of the device itself: matrix products a second, and memory."""

from __future__ import annotations

import os
import time

import torch

from vistune.device import Device

_SIDES = (8192, 4096)
_ROUNDS = 8
_BYTES_SHARE = 0.05


def measure_matmul_tflops(device: Device) -> float | None:
    """Multiplies two square matrices of random numbers in the device's own format.

    2 n^3 operations over the median time of 8 products, after 3 that are not counted. It takes
    some milliseconds and, at most, a twentieth of the memory. A chip under long load clocks down,
    so what a whole step reaches of it has a ceiling below 100 %.

    Args:
        device: Where to compute.

    Returns:
        TFLOP/s; None on a CPU, where it would take seconds and says little.
    """
    if device.kind != "cuda":
        return None
    free = torch.cuda.mem_get_info(device.torch_device)[0]
    width = device.dtype.itemsize
    side = next((n for n in _SIDES if 3 * n * n * width <= _BYTES_SHARE * free), 2048)
    a, b, out = (
        torch.randn(side, side, device=device.torch_device, dtype=device.dtype) for _ in range(3)
    )
    times = []
    for index in range(3 + _ROUNDS):
        device.synchronize()
        started_s = time.perf_counter()
        torch.mm(a, b, out=out)
        device.synchronize()
        if index >= 3:
            times.append(time.perf_counter() - started_s)
    del a, b, out
    torch.cuda.empty_cache()
    return 2 * side**3 / sorted(times)[len(times) // 2] / 1e12


def free_memory_gib(device: Device) -> float:
    """Returns the memory that is free on a device now; half of the machine's own for others."""
    if device.kind == "cuda":
        return torch.cuda.mem_get_info(device.torch_device)[0] / 2**30
    if device.kind == "npu":
        return torch.accelerator.get_memory_info(device.torch_device)[0] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31

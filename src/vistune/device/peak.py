"""A device's two ceilings, asked of the device itself: matrix products a second, and memory."""

from __future__ import annotations

import os
import time

import torch

from vistune.device import Device

_SIDES = (8192, 4096)
_SHORTEST_SIDE = 512
_LONG_ENOUGH_S = 2e-3
_WARM_UP = 3
_ROUNDS = 8
_BYTES_SHARE = 0.05


def measure_matmul_tflops(device: Device) -> float | None:
    """Multiplies two square matrices of random numbers in the device's own format.

    2 n^3 operations over the median time of 8 products, after 3 that are not counted. It takes
    some milliseconds and, at most, a twentieth of the memory. A chip under long load clocks down,
    so what a whole step reaches of it has a ceiling below 100 %. On a CPU, with as many threads as
    torch is set to, n is the first of 512, 1,024, ... whose product takes 2 ms: long enough for the
    threads' start not to count.

    Args:
        device: Where to compute.

    Returns:
        TFLOP/s; None on mps, where this was never tried.
    """
    if device.kind == "mps":
        return None
    if device.kind == "cpu":
        side = _SHORTEST_SIDE
        while side < _SIDES[-1] and _product_s(device, side, rounds=1, warm_up=1) < _LONG_ENOUGH_S:
            side *= 2
        return 2 * side**3 / _product_s(device, side, rounds=_ROUNDS, warm_up=0) / 1e12
    free, width = free_memory_gib(device) * 2**30, device.dtype.itemsize
    side = next((n for n in _SIDES if 3 * n * n * width <= _BYTES_SHARE * free), 2048)
    seconds = _product_s(device, side, rounds=_ROUNDS, warm_up=_WARM_UP)
    torch.accelerator.empty_cache()
    return 2 * side**3 / seconds / 1e12


def _product_s(device: Device, side: int, *, rounds: int, warm_up: int) -> float:
    """Returns the median time of a product of two square matrices."""
    a, b, out = (
        torch.randn(side, side, device=device.torch_device, dtype=device.dtype) for _ in range(3)
    )
    times = []
    for index in range(warm_up + rounds):
        device.synchronize()
        started_s = time.perf_counter()
        torch.mm(a, b, out=out)
        device.synchronize()
        if index >= warm_up:
            times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


def free_memory_gib(device: Device) -> float:
    """Returns the memory that is free on a device now; half of the machine's own for others."""
    if device.kind == "cuda":
        return torch.cuda.mem_get_info(device.torch_device)[0] / 2**30
    if device.kind == "npu":
        return torch.accelerator.get_memory_info(device.torch_device)[0] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31

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
    torch is set to, n is the first of 512, 1,024, ... whose product takes 2 ms, long enough for the
    threads' start not to count, and the fastest of 5 counts, as others may use the cores too.

    Args:
        device: Where to compute.

    Returns:
        TFLOP/s; None on mps, where this was never tried.
    """
    if device.kind == "mps":
        return None
    if device.kind == "cpu":
        side = _SHORTEST_SIDE
        while (fastest_s := min(_products_s(device, side, rounds=5))) < _LONG_ENOUGH_S:
            side *= 2
        return 2 * side**3 / fastest_s / 1e12
    free, width = free_memory_gib(device) * 2**30, device.dtype.itemsize
    side = next((n for n in _SIDES if 3 * n * n * width <= _BYTES_SHARE * free), 2048)
    times = sorted(_products_s(device, side, rounds=_WARM_UP + _ROUNDS)[_WARM_UP:])
    torch.get_device_module(device.torch_device).empty_cache()
    return 2 * side**3 / times[len(times) // 2] / 1e12


def _products_s(device: Device, side: int, *, rounds: int) -> list[float]:
    """Returns the time of each product of two square matrices."""
    a, b, out = (
        torch.randn(side, side, device=device.torch_device, dtype=device.dtype) for _ in range(3)
    )
    times = []
    for _ in range(rounds):
        device.synchronize()
        started_s = time.perf_counter()
        torch.mm(a, b, out=out)
        device.synchronize()
        times.append(time.perf_counter() - started_s)
    return times


def free_memory_gib(device: Device) -> float:
    """Returns the memory this process may take on a device now; half of the machine's for others.

    On a CUDA device that is what is free, and no more than a cap that torch was set to leaves
    (`torch.cuda.set_per_process_memory_fraction`, or the allocator's own setting).
    """
    if device.kind == "cuda":
        where = device.torch_device
        free, total = torch.cuda.mem_get_info(where)
        allowed = torch.cuda.get_per_process_memory_fraction(where) * total
        return min(free, max(0.0, allowed - torch.cuda.memory_reserved(where))) / 2**30
    if device.kind == "npu":
        return torch.accelerator.get_memory_info(device.torch_device)[0] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31

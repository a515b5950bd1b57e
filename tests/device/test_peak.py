"""What a device is measured to do."""

import time

import pytest
import torch

from vistune.device import Device, select_device
from vistune.device.peak import free_memory_gib, measure_matmul_tflops


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_of_a_cpu_are_measured_in_no_time(dtype):
    device = select_device("cpu", dtype)
    started_s = time.process_time()
    rate = measure_matmul_tflops(device)
    # A hundredth of what a first step costs; machines without bf16 in hardware are slow at it.
    assert rate is not None and time.process_time() - started_s < 2.0
    # The same product by hand. A factor of 3: tests share the machine's cores with others.
    a = torch.randn(512, 512, dtype=device.dtype)
    torch.mm(a, a)
    times = []
    for _ in range(9):
        started_s = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started_s)
    by_hand = 2 * 512**3 / sorted(times)[4] / 1e12
    assert by_hand / 3 < rate < by_hand * 3


def test_what_was_never_tried_is_not_measured():
    assert measure_matmul_tflops(Device(torch.device("mps"), "test", torch.float32)) is None


def test_free_memory_of_a_cpu_is_half_the_machines():
    assert free_memory_gib(select_device("cpu")) > 0


@pytest.mark.parametrize(("share", "free_gib"), [(1.0, 90), (0.25, 34)])
def test_memory_beyond_a_cap_is_not_free(monkeypatch, share, free_gib):
    asked = {
        "mem_get_info": (90 * 2**30, 140 * 2**30),
        "get_per_process_memory_fraction": share,
        "memory_reserved": 2**30,
    }
    for name, value in asked.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    card = Device(torch.device("cuda", 0), "test", torch.bfloat16)
    assert free_memory_gib(card) == free_gib

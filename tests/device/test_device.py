"""The device contract on the machine at hand: names, formats, and no silent substitute."""

import platform
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from vistune.device import seed_everything, select_device, set_matmul_precision, versions
from vistune.errors import DeviceError


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert select_device("cpu").dtype is torch.float32
    assert select_device("cpu", "bf16").dtype is torch.bfloat16


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the system does not say it")
def test_a_cpu_goes_by_its_own_name():
    name = select_device("cpu").name
    said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert name in said if "model name" in said else name == platform.machine()


def test_the_memory_of_a_cpu_is_that_of_the_process():
    device = select_device("cpu")
    before = device.peak_memory_gib()
    assert before is not None and before > 0.05  # torch alone takes more
    held = np.ones(int((before + 0.05) * 2**30), dtype=np.uint8)  # more than it ever had in all
    after = device.peak_memory_gib()
    assert after is not None and before + 0.05 < after < 2 * before + 0.1
    del held


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is present")
def test_an_absent_device_is_an_error_not_a_fallback():
    with pytest.raises(DeviceError, match="'cuda' is not available"):
        select_device("cuda")
    assert select_device("auto").kind == "cpu"
    with pytest.raises(DeviceError, match=r"present: cpu\n"):
        select_device("npu")


def test_seeding_repeats_every_generator():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    assert draw() == draw()


def test_versions_name_the_packages_that_decide_results():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "tokenizers", "vistune"} <= set(found)


@pytest.mark.parametrize(("precision", "in_16_bit"), [("highest", False), ("high", True)])
def test_parts_of_products_are_added_in_fp32_at_the_highest_precision(precision, in_16_bit):
    products = torch.backends.cuda.matmul
    before = (
        torch.get_float32_matmul_precision(),
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
    )
    try:
        set_matmul_precision(precision)
        assert torch.get_float32_matmul_precision() == precision
        assert products.allow_bf16_reduced_precision_reduction is in_16_bit
        assert products.allow_fp16_reduced_precision_reduction is in_16_bit
    finally:
        torch.set_float32_matmul_precision(before[0])
        products.allow_bf16_reduced_precision_reduction = before[1]
        products.allow_fp16_reduced_precision_reduction = before[2]

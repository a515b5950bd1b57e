"""The device contract on the machine at hand: names, formats, and no silent substitute."""

import random

import numpy as np
import pytest
import torch

from vistune.device import seed_everything, select_device, versions
from vistune.errors import DeviceError


def test_a_cpu_computes_in_fp32_unless_told_otherwise():
    assert select_device("cpu").dtype is torch.float32
    assert select_device("cpu", "bf16").dtype is torch.bfloat16
    assert select_device("cpu").peak_memory_gib() is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is present")
def test_an_absent_device_is_an_error_not_a_fallback():
    with pytest.raises(DeviceError, match="'cuda' is not available"):
        select_device("cuda")
    assert select_device("auto").kind == "cpu"


def test_seeding_repeats_every_generator():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    assert draw() == draw()


def test_versions_name_the_packages_that_decide_results():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "tokenizers", "vistune"} <= set(found)

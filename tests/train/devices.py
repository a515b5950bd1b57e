"""Devices that a test runs on: the CPU, and a GPU under the marker `gpu`. Not a test."""

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device"),
        ],
    ),
]
"""For `pytest.mark.parametrize("device", DEVICES)`."""

REPEATS = {"cpu": 0.0, "cuda": 1e-3}
"""Relative difference of the losses of two runs of the same arithmetic: none on a CPU. On a GPU
atomic additions may come in another order, and Adam's first steps are as large as the rate for the
smallest gradient too."""

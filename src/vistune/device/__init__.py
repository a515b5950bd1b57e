"""One contract for every device: what it is, its number formats, memory, seeds and clocks.

Not a scheduler: it names one device for this process and says what it falls back to.
"""

from __future__ import annotations

import os
import platform
import random
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vistune.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """The device this process computes on.

    Args:
        torch_device: What tensors are moved to.
        name: The device's own name, for reports.
        dtype: Format of frozen weights and of activations.
        note: What was fallen back to and why; empty when nothing was.
    """

    torch_device: torch.device
    name: str
    dtype: torch.dtype
    note: str = ""

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` (NVIDIA, ROCm and DCU), `npu` or `mps`."""
        return self.torch_device.type

    def synchronize(self) -> None:
        """Waits until the device has done all work given to it."""
        if self.kind != "cpu":
            torch.accelerator.synchronize(self.torch_device)

    def reset_peak_memory(self) -> None:
        """Starts a new measurement of peak memory."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch_device)
        elif self.kind == "npu":
            torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def peak_memory_gib(self) -> float | None:
        """Returns the most memory tensors held since the last reset, or None where not measured.

        On a CPU nobody counts tensors: it is the most memory this process had since it started,
        libraries included.
        """
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device) / 2**30
        if self.kind == "npu":
            return torch.accelerator.max_memory_allocated(self.torch_device) / 2**30
        return _peak_of_process_gib() if self.kind == "cpu" else None


def _peak_of_process_gib() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if platform.system() == "Darwin" else 2**20)  # bytes there, KiB elsewhere


def _first_accelerator() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _has_bf16(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "npu"


def select_device(device: str = "auto", dtype: str = "auto") -> Device:
    """Returns the device a recipe names.

    Args:
        device: auto, cpu, cuda, mps or npu.
        dtype: auto, fp32 or bf16.

    Raises:
        DeviceError: The device named is not there.
    """
    kind = _first_accelerator() if device == "auto" else device
    if kind != "cpu" and kind != _first_accelerator():
        raise DeviceError(
            f"device '{kind}' is not available to torch {torch.__version__}",
            expected=f"present: {', '.join(dict.fromkeys(('cpu', _first_accelerator())))}",
            fix="set device=auto, or install the torch build for this device",
        )
    note = ""
    if dtype == "auto":
        chosen = torch.bfloat16 if _has_bf16(kind) else torch.float32
        if kind != "cpu" and chosen is torch.float32:
            note = f"{kind} has no bf16 in hardware: computing in fp32"
    else:
        chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if kind == "cpu":
        return Device(torch.device("cpu"), _cpu_name(), chosen, note)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = torch.cuda.get_device_name(local_rank) if kind == "cuda" else kind
    return Device(torch.device(kind, local_rank), name, chosen, note)


def _cpu_name() -> str:
    """Returns the processor's own name where the system says it (Linux), else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.processor() or platform.machine())


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU, None for any other device.

    Torch gives AMD's GPUs numbers of their own in its place, which say nothing of what these do.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def has_triton(device: torch.device) -> bool:
    """Returns whether Triton kernels run on a device; imports nothing."""
    return device.type == "cuda" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def set_matmul_precision(precision: Literal["highest", "high", "medium"]) -> None:
    """Sets the arithmetic inside matrix products, for the process.

    Torch lets CUDA add the parts of a long 16-bit product in 16 bits by default. Where a model's
    gradient is the small difference of large numbers (at a token attention drains to), that is
    noise; `highest` has them added in fp32.

    Args:
        precision: `highest`, or what fp32 products may use (`high`: TF32, `medium`: bf16).
    """
    torch.set_float32_matmul_precision(precision)
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = precision != "highest"
    products.allow_fp16_reduced_precision_reduction = precision != "highest"


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Returns the versions that decide what a run computes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "vistune",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "tokenizers",
        "numpy",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

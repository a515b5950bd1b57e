"""Numbers of 8 and 4 bits: what multiplies them, asked for before anything is loaded."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from vistune.device import nvidia_capability
from vistune.errors import DeviceError, MissingExtraError

_FP8_CAPABILITY = (8, 9)
_KERNEL_NOTICE = "Failed to load CPU gemm_4bit_forward"
_CAST_NOTICE = "MatMul8bitLt: inputs will be cast from"


def _not_the_kernel_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KERNEL_NOTICE)


def _not_the_cast_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CAST_NOTICE)


def quiet_kernel_notice() -> None:
    """Silences one notice of bitsandbytes; call it before anything that imports the package.

    On import, bitsandbytes 0.50 asks the package `kernels` for a faster 4-bit product of single
    rows on CPUs and warns when it is not installed. Nobody here asked for it, peft imports
    bitsandbytes for LoRA without any rounding too, and the results are the same without. Every
    other message of the package still comes out.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_the_kernel_notice)


def import_bitsandbytes(purpose: str) -> Any:
    """Returns the package `bitsandbytes`.

    Args:
        purpose: The setting that needs it, for the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    quiet_kernel_notice()
    # A line for every 8-bit product of every step: that inputs are rounded is what int8 means.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_the_cast_notice)
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError.of("bitsandbytes", extra="qlora", purpose=purpose) from error


def require_bitsandbytes(purpose: str) -> None:
    """Refuses what needs `bitsandbytes` where it is not installed; imports nothing.

    Args:
        purpose: The setting that needs it, for the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError.of("bitsandbytes", extra="qlora", purpose=purpose)


def require_fp8(device: torch.device) -> None:
    """Refuses frozen weights in FP8 on a device that does not multiply them.

    Raises:
        DeviceError: It does not.
    """
    require_fp8_capability(nvidia_capability(device), name=str(device))


def require_fp8_capability(capability: tuple[int, int] | None, *, name: str) -> None:
    """As `require_fp8`, for a device that need not be here.

    Args:
        capability: NVIDIA's compute capability; None for devices of other makers.
        name: The device, for the message.

    Raises:
        DeviceError: It does not multiply FP8.
    """
    if capability is not None and capability >= _FP8_CAPABILITY:
        return
    raise DeviceError(
        "this device does not multiply FP8",
        where="tune.language.frozen_format",
        got=name,
        expected="an NVIDIA GPU of compute capability 8.9 or higher",
        fix="set tune.language.frozen_format=same",
    )

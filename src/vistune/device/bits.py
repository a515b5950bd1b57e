"""The optional package for 8- and 4-bit numbers, imported only when a recipe asks for it."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from vistune.errors import MissingExtraError

_KERNEL_NOTICE = "Failed to load CPU gemm_4bit_forward"


def _not_the_kernel_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KERNEL_NOTICE)


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
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError.of("bitsandbytes", extra="qlora", purpose=purpose) from error

"""The optional package for 8- and 4-bit numbers, imported only when a recipe asks for it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vistune.errors import MissingExtraError


def import_bitsandbytes(purpose: str) -> Any:
    """Returns the package `bitsandbytes`.

    Args:
        purpose: The setting that needs it, for the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingExtraError.of("bitsandbytes", extra="qlora", purpose=purpose) from error

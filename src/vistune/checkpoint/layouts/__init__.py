"""Whole-model directories, one module per public layout, recognised by what is in them."""

from vistune.checkpoint.layouts.directory import (
    bases_of,
    describe_directory,
    load_directory,
    told_by_config,
)
from vistune.checkpoint.layouts.partial import Partial, read_partial

__all__ = [
    "Partial",
    "bases_of",
    "describe_directory",
    "load_directory",
    "read_partial",
    "told_by_config",
]

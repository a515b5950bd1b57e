"""Parity: a reference dump (weights, config, inputs, outputs) against this implementation."""

from vistune.compare.parity.directory import FORMATS, ParityReport, compare_directory
from vistune.compare.parity.ledger import TOLERANCE, TOLERANCES, Check, relative_error

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "TOLERANCES",
    "Check",
    "ParityReport",
    "compare_directory",
    "relative_error",
]

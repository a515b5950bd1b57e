"""Compares a model here with the numbers that another implementation of it left behind."""

from vistune.compare.parity import Check, ParityReport, compare_directory

__all__ = ["Check", "ParityReport", "compare_directory"]

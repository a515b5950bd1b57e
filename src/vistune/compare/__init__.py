"""Compares runs with each other, and models here with the numbers other implementations left.

Importing this package imports nothing heavy; `vistune.compare.parity` needs torch.
"""

from vistune.compare.curves import CurveComparison, CurvePoint, compare_runs, read_curve

__all__ = ["CurveComparison", "CurvePoint", "compare_runs", "read_curve"]

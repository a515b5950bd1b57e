"""Runs the comparison of a directory: which model it holds is read from config and tensors' names.

A directory holds `config.json`, weights under their public names, and one or more `io*.npz`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vistune.compare.parity import cogvlm2, internlm2, llava, mgm, visualglm
from vistune.compare.parity.ledger import TOLERANCES, Check, Ledger, read_arrays
from vistune.errors import CheckpointError
from vistune.models.families.files import read_config, tensor_names


class Case(Protocol):
    """One kind of model: a module of this package."""

    NAME: str

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Whether config and tensors' names are of this kind."""
        ...

    def compare(self, directory: Path, config: dict[str, Any], ledger: Ledger) -> None:
        """Computes the arrays of one file and compares them."""
        ...


CASES: tuple[Case, ...] = (cogvlm2, visualglm, internlm2, mgm, llava)


@dataclass(frozen=True)
class ParityReport:
    """What came out.

    Args:
        model: The kind of model.
        checks: One line an array.
        tolerance: What passed was at most this.
        dtype: Format of the weights.
    """

    model: str
    checks: tuple[Check, ...]
    tolerance: float
    dtype: torch.dtype = torch.float32

    @property
    def compared(self) -> tuple[Check, ...]:
        """The lines that hold a result."""
        return tuple(check for check in self.checks if check.passed is not None)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The lines that did not pass."""
        return tuple(check for check in self.checks if check.passed is False)


FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Formats of weights by the names people write."""


def compare_directory(
    directory: Path, *, tolerance: float | None = None, dtype: torch.dtype = torch.float32
) -> ParityReport:
    """Compares every array of a reference dump with what this implementation computes.

    Args:
        directory: Config, weights and `io*.npz`; its name plays no part.
        tolerance: Largest error relative to the largest value of an array; that of the format
            when None (`TOLERANCES`).
        dtype: Format of the weights here: float32, or bfloat16.

    Raises:
        CheckpointError: There is nothing to compare, or inputs are missing.
        ModelError: The config cannot be read.
        WeightsError: A tensor is missing, left over or of another shape.
    """
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    config, keys = read_config(directory), tensor_names(directory)
    case = next((case for case in CASES if case.matches(config, keys)), None)
    if case is None:
        raise CheckpointError(
            "this is no model that can be compared",
            where=str(directory),
            got=f"{len(keys)} tensors such as {', '.join(sorted(keys)[:3])}",
            expected=", ".join(case.NAME for case in CASES),
        )
    files = sorted(directory.glob("io*.npz"))
    if not files:
        raise CheckpointError(
            "there are no reference outputs here", where=str(directory), expected="io*.npz"
        )
    checks: list[Check] = []
    for path in files:
        ledger = Ledger(path.name, read_arrays(path), tolerance, dtype)
        with torch.random.fork_rng(devices=[]):
            case.compare(directory, config, ledger)
        checks += ledger.checks()
    report = ParityReport(case.NAME, tuple(checks), tolerance, dtype)
    if not report.compared:
        raise CheckpointError(
            "no array of the reference is known to this comparison",
            where=str(directory),
            got=", ".join(check.array for check in checks[:8]),
        )
    return report

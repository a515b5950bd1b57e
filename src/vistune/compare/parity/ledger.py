"""What was compared, with which result, and what was not. It knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistune.errors import CheckpointError

TOLERANCE = 2e-5
"""Largest error relative to the largest reference value. In fp32 on a CPU two implementations
round sums of some hundred terms differently; a wrong formula is off by 1e-3 and more."""
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 5e-2}
"""By the format of the weights. bfloat16 keeps 8 bits: each rounding on the way is off by up to
2^-8 = 0.004 of what it rounds. Of the arrays of tiny models the worst, a gradient behind two towers
and the mining, is off by 0.037, logits by 0.022, losses by 0.001. Small faults hide in that: a port
is proved in fp32."""


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference, relative to the largest value of the reference.

    Args:
        ours: Found here.
        theirs: The reference, of the same shape; where it is all zero the difference counts as is.
    """
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    scale = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) / (scale or 1.0)


@dataclass(frozen=True)
class Check:
    """The result for one array.

    Args:
        file: The file it stands in.
        array: Its name.
        error: Largest relative error; for whole numbers and masks the part of values that differ.
            None where it was not compared.
        passed: Whether that is small enough; None where it was not compared.
        note: What has to be said besides.
    """

    file: str
    array: str
    error: float | None
    passed: bool | None
    note: str = ""


@dataclass
class Ledger:
    """The arrays of one file, and what became of each.

    Args:
        file: The file's name.
        arrays: Its arrays.
        tolerance: Largest relative error that passes.
        dtype: Format of the weights, and so of what a model is given.
    """

    file: str
    arrays: Mapping[str, Tensor]
    tolerance: float = TOLERANCE
    dtype: torch.dtype = torch.float32
    _checks: dict[str, Check] = field(default_factory=dict)
    _inputs: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def has(self, *names: str) -> bool:
        """Whether all of the arrays are there."""
        return all(name in self.arrays for name in names)

    def take(self, name: str) -> Tensor:
        """Returns an array as an input, which is not compared; numbers in the weights' format.

        Raises:
            CheckpointError: It is not there.
        """
        if name not in self.arrays:
            raise CheckpointError(
                f"the reference lacks the array '{name}'",
                where=self.file,
                expected="the inputs of the model, under the names of a parity directory",
            )
        self._inputs.add(name)
        found = self.arrays[name]
        return found.to(self.dtype) if found.is_floating_point() else found

    def compare(
        self, name: str, ours: Tensor, *, kept: Tensor | None = None, note: str = ""
    ) -> None:
        """Compares an array, if the file has it.

        Args:
            name: Its name.
            ours: What is found here.
            kept: bool, the leading axes' positions that count (padding does not).
            note: What has to be said besides.
        """
        if name not in self.arrays:
            return
        theirs = self.arrays[name]
        if tuple(ours.shape) != tuple(theirs.shape):
            shapes = f"{tuple(ours.shape)} here, {tuple(theirs.shape)} in the reference"
            self._put(name, error=None, passed=False, note=shapes)
            return
        if kept is not None:
            ours, theirs = ours[kept], theirs[kept]
        if theirs.is_floating_point():
            error = relative_error(ours, theirs)
            self._put(name, error=error, passed=error <= self.tolerance, note=note)
        else:
            differing = float((ours.long() != theirs.long()).double().mean()) if ours.numel() else 0
            self._put(name, error=differing, passed=differing == 0.0, note=note)

    def closest(self, name: str, candidates: Mapping[str, Tensor]) -> None:
        """Compares an array with the likeliest of several: a dump does not say which layer it is.

        Args:
            name: Its name.
            candidates: What is found here, by what it is.
        """
        if name not in self.arrays:
            return
        theirs = self.arrays[name]
        fitting = {k: t for k, t in candidates.items() if t.shape == theirs.shape}
        if not fitting:
            self._put(name, error=None, passed=False, note="nothing here has its shape")
            return
        best = min(fitting, key=lambda k: relative_error(fitting[k], theirs))
        self.compare(name, fitting[best], note=best)

    def compare_tokens(self, name: str, ours: Tensor) -> None:
        """Compares what a model says, which only fp32 decides: elsewhere the best two may tie."""
        if self.dtype is torch.float32:
            self.compare(name, ours)
        else:
            self.leave(name, "rounded scores may tie")

    def leave(self, name: str, note: str) -> None:
        """Says why an array is not compared."""
        if name in self.arrays:
            self._put(name, error=None, passed=None, note=note)

    def checks(self) -> list[Check]:
        """Returns one line for every array, in the order of the file."""
        lines = []
        for name in self.arrays:
            rest = "input" if name in self._inputs else "not known to this comparison"
            lines.append(self._checks.get(name) or Check(self.file, name, None, None, rest))
        return lines

    def _put(self, name: str, *, error: float | None, passed: bool | None, note: str) -> None:
        self._checks[name] = Check(self.file, name, error, passed, note)


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of an `.npz` file.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CheckpointError(
            "the reference's arrays cannot be read", where=str(path), got=str(error)
        ) from error

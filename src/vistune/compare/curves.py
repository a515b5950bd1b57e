"""Two runs step by step: how far their losses lie apart, and whose steps are faster.

Only `metrics.jsonl` is read. Nothing is smoothed or aligned: step k is compared with step k, so
the runs must have seen the same samples in the same order; where their counts say that they did
not, the comparison says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vistune.errors import DataError

METRICS_NAME = "metrics.jsonl"
NUM_WARMUP_STEPS = 3
"""First common steps that count for losses and not for times: kernels are chosen, workers start."""


@dataclass(frozen=True)
class CurvePoint:
    """One logged step.

    Args:
        step: Optimizer updates done.
        loss: Nats per target token.
        target_tokens: Tokens learnt from; None where the file does not say.
        tokens: Tokens of the step; None where the file does not say.
        step_s: Wall time of the step; None where it was not measured.
    """

    step: int
    loss: float
    target_tokens: int | None = None
    tokens: int | None = None
    step_s: float | None = None


@dataclass(frozen=True)
class CurveComparison:
    """Run B measured against run A, over the steps both have logged.

    Args:
        steps: These steps, rising.
        losses_a: Losses of A at them.
        losses_b: Losses of B at them.
        num_only_a: Steps that only A has.
        num_only_b: Steps that only B has.
        other_data_at: First common step whose token counts differ; None where all agree.
        step_s_a: Median wall time of A's steps; None where it was not measured.
        step_s_b: The same of B's.
    """

    steps: tuple[int, ...]
    losses_a: tuple[float, ...]
    losses_b: tuple[float, ...]
    num_only_a: int
    num_only_b: int
    other_data_at: int | None
    step_s_a: float | None
    step_s_b: float | None

    @property
    def residuals(self) -> tuple[float, ...]:
        """(b - a) / |a| of each step; infinite where only a is zero."""
        return tuple(_residual(a, b) for a, b in zip(self.losses_a, self.losses_b, strict=True))

    @property
    def mean_error(self) -> float:
        """Mean of the residuals' sizes: the mean relative error of the loss curve."""
        return fmean(abs(r) for r in self.residuals)

    @property
    def mean_residual(self) -> float:
        """Mean of the residuals with their signs: whether B lies above A on the whole."""
        return fmean(self.residuals)

    @property
    def worst(self) -> tuple[int, float]:
        """The step with the largest residual, and that residual."""
        index = max(range(len(self.steps)), key=lambda i: abs(self.residuals[i]))
        return self.steps[index], self.residuals[index]

    @property
    def end_residual(self) -> float:
        """Residual of the mean loss over the last tenth of the steps."""
        tail = max(1, len(self.steps) // 10)
        return _residual(fmean(self.losses_a[-tail:]), fmean(self.losses_b[-tail:]))

    @property
    def step_time_ratio(self) -> float | None:
        """Median step of B over that of A: below 1, B is faster."""
        if self.step_s_a is None or self.step_s_b is None:
            return None
        return self.step_s_b / self.step_s_a


def read_curve(run: Path) -> tuple[CurvePoint, ...]:
    """Reads what a run logged.

    Args:
        run: A run directory, or its `metrics.jsonl`.

    Returns:
        Its points by rising step; of a step logged twice, the later line.

    Raises:
        DataError: There is no such file, it is empty, or a line is not a step's record.
    """
    path = run / METRICS_NAME if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the run's metrics cannot be read",
            where=str(path),
            got=str(error),
            fix="name a run directory of vistune train, or its metrics.jsonl",
        ) from error
    points = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            point = _point(line, where=f"{path}:{number}")
            points[point.step] = point
    if not points:
        raise DataError("the run has logged no step", where=str(path))
    return tuple(points[step] for step in sorted(points))


def _point(line: str, *, where: str) -> CurvePoint:
    try:
        record: dict[str, Any] = json.loads(line)
        loss = float(record["loss"])
        point = CurvePoint(
            step=int(record["step"]),
            loss=loss,
            target_tokens=record.get("target_tokens"),
            tokens=record.get("tokens"),
            step_s=record.get("step_s"),
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            "this line is not the record of a step",
            where=where,
            got=line[:80],
            expected='a JSON object with "step" and "loss"',
        ) from error
    if not math.isfinite(loss):
        raise DataError("the loss is not a number", where=where, got=str(loss))
    return point


def compare_runs(run_a: Path, run_b: Path) -> CurveComparison:
    """Compares the curves of two runs.

    Args:
        run_a: The run that is the reference.
        run_b: The run that is measured against it.

    Raises:
        DataError: A run cannot be read, or they have no step in common.
    """
    a = {point.step: point for point in read_curve(run_a)}
    b = {point.step: point for point in read_curve(run_b)}
    steps = tuple(sorted(a.keys() & b.keys()))
    if not steps:
        raise DataError(
            "the runs have no step in common",
            where=f"{run_a}, {run_b}",
            got=f"steps {min(a)} to {max(a)}, and {min(b)} to {max(b)}",
        )
    timed = steps[NUM_WARMUP_STEPS:] or steps
    return CurveComparison(
        steps=steps,
        losses_a=tuple(a[step].loss for step in steps),
        losses_b=tuple(b[step].loss for step in steps),
        num_only_a=len(a) - len(steps),
        num_only_b=len(b) - len(steps),
        other_data_at=next((step for step in steps if _counts_differ(a[step], b[step])), None),
        step_s_a=_median_time([a[step] for step in timed]),
        step_s_b=_median_time([b[step] for step in timed]),
    )


def _counts_differ(a: CurvePoint, b: CurvePoint) -> bool:
    pairs = ((a.target_tokens, b.target_tokens), (a.tokens, b.tokens))
    return any(x != y for x, y in pairs if x is not None and y is not None)


def _median_time(points: list[CurvePoint]) -> float | None:
    times = [point.step_s for point in points if point.step_s is not None]
    return median(times) if times else None


def _residual(reference: float, value: float) -> float:
    if value == reference:
        return 0.0
    return (value - reference) / abs(reference) if reference else math.copysign(math.inf, value)

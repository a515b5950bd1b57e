"""Uncertainty of a score and of a difference between two systems asked the same questions.

Questions about one image are not independent: images, not questions, are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from vistune.errors import DataError
from vistune.recipe import Section

NUM_RESAMPLES = 10_000
_CHUNK_CELLS = 4_000_000


class Estimate(Section):
    """A mean with its 95 % interval."""

    mean: float
    """Mean score over questions, in [0, 1]."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    num_questions: int
    """Questions behind it."""
    num_images: int
    """Independent units (images) behind it."""


class Difference(Section):
    """What one system gains over another on the same questions."""

    mean: float
    """Mean of the paired differences, first minus second."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided exact sign test over images (ties left out)."""
    num_better: int
    """Images on which the first scores more."""
    num_worse: int
    """Images on which the second scores more."""

    @property
    def is_clear(self) -> bool:
        """Whether interval and test agree that the difference is not chance."""
        return (self.low > 0 or self.high < 0) and self.p_value < 0.05


def estimate(scores: Sequence[float], units: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Returns the mean score with its bootstrap interval.

    Args:
        scores: One score in [0, 1] per question.
        units: What each question belongs to (its image), same length.
        seed: Seed of the resampling.

    Raises:
        DataError: There is no question.
    """
    sums, counts = _grouped(scores, units)
    mean = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) == 0:
        # Resampling equal scores says nothing; Wilson's interval still does.
        low, high = _wilson(mean, len(counts))
        low, high = min(low, mean), max(high, mean)
    else:
        low, high = _interval(_resampled_means(sums, counts, seed))
    return Estimate(
        mean=mean, low=low, high=high, num_questions=int(counts.sum()), num_images=len(counts)
    )


def difference(
    first: Sequence[float],
    second: Sequence[float],
    units: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Difference:
    """Returns the paired difference of two systems with its interval and test.

    Args:
        first: Scores of the first system, one per question.
        second: Scores of the second on the same questions in the same order.
        units: What each question belongs to (its image).
        seed: Seed of the resampling.

    Raises:
        DataError: There is no question.
    """
    assert len(first) == len(second), "paired scores need the same questions"
    gains = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    sums, counts = _grouped(gains, units)
    low, high = _interval(_resampled_means(sums, counts, seed))
    better, worse = int((sums > 1e-12).sum()), int((sums < -1e-12).sum())
    mean = float(sums.sum() / counts.sum())
    return Difference(
        mean=mean,
        low=low,
        high=high,
        p_value=sign_test(better, worse),
        num_better=better,
        num_worse=worse,
    )


def sign_test(num_better: int, num_worse: int) -> float:
    """Returns the two-sided exact p-value of a fair coin giving so uneven a split.

    Args:
        num_better: Pairs in which the first won.
        num_worse: Pairs in which the second won.
    """
    total, fewer = num_better + num_worse, min(num_better, num_worse)
    if total == 0:
        return 1.0
    # log of C(n, k) / 2^n, summed from the largest term down so that large n neither overflows
    # nor underflows before the end.
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(fewer + 1)
    ]
    top = max(logs)
    tail = math.exp(top - total * math.log(2)) * sum(math.exp(term - top) for term in logs)
    return min(1.0, 2 * tail)


def _grouped(
    values: Sequence[float] | npt.NDArray[np.float64], units: Sequence[Hashable]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns sum and count of the values of each unit, in order of first appearance."""
    if len(values) == 0:
        raise DataError("there is no question to score")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(unit, len(numbers)) for unit in units])
    sums = np.bincount(index, weights=np.asarray(values)).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    num = len(sums)
    means = []
    rows = max(1, min(NUM_RESAMPLES, _CHUNK_CELLS // num))
    for start in range(0, NUM_RESAMPLES, rows):
        drawn = rng.integers(0, num, size=(min(rows, NUM_RESAMPLES - start), num))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _interval(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _wilson(mean: float, num: int, z: float = 1.959964) -> tuple[float, float]:
    centre = (mean + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)

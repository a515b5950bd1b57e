"""Intervals and tests against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vistune.errors import DataError
from vistune.evaluate.bootstrap import difference, estimate, sign_test


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (8, 2), (3, 3), (60, 40), (0, 17)])
def test_sign_test_is_the_exact_binomial(better: int, worse: int) -> None:
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    expected = min(1.0, 2 * tail / 2**total)
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_sign_test_of_many_pairs() -> None:
    # Normal approximation with continuity correction: z = (|10400 - 9600| - 1) / sqrt(20000).
    z = 799 / math.sqrt(20000)
    assert sign_test(10400, 9600) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 <= sign_test(90000, 10) < 1e-300


def test_estimate_of_a_proportion() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    found = estimate(scores, range(100))
    # Standard error sqrt(.6 * .4 / 100) = 0.049; the bootstrap's ends move by about 0.005.
    assert found.mean == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.015)
    assert (found.num_questions, found.num_images) == (100, 100)


def test_all_right_is_not_certain() -> None:
    found = estimate([1.0] * 10, range(10))
    # Wilson: 1 / (1 + z^2 / n) = 10 / 13.84
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-4)


def test_questions_of_one_image_are_one_unit() -> None:
    # 20 images, each all right or all wrong, 10 questions each: the interval must be that of 20
    # units, sqrt(10) times wider than that of 200.
    scores = [float(image % 2) for image in range(20) for _ in range(10)]
    units = [image for image in range(20) for _ in range(10)]
    clustered = estimate(scores, units)
    independent = estimate(scores, range(200))
    ratio = (clustered.high - clustered.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


def test_paired_difference_uses_the_pairing() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    first = (rng.random(400) * 0.1 + hard > 0.45).astype(float)
    second = (hard > 0.5).astype(float)
    paired = difference(first.tolist(), second.tolist(), range(400))
    shuffled = difference(first.tolist(), rng.permutation(second).tolist(), range(400))
    assert paired.mean == pytest.approx(float((first - second).mean()))
    assert paired.high - paired.low < 0.6 * (shuffled.high - shuffled.low)
    assert paired.is_clear
    assert (paired.num_better, paired.num_worse) == (
        int((first > second).sum()),
        int((first < second).sum()),
    )


def test_no_difference_is_not_clear() -> None:
    same = difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], "abc")
    assert (same.mean, same.low, same.high, same.p_value, same.is_clear) == (0, 0, 0, 1.0, False)


def test_the_seed_decides() -> None:
    scores = np.random.default_rng(1).random(50).tolist()
    assert estimate(scores, range(50), seed=3) == estimate(scores, range(50), seed=3)
    assert estimate(scores, range(50), seed=3) != estimate(scores, range(50), seed=4)


def test_nothing_to_score() -> None:
    with pytest.raises(DataError):
        estimate([], [])

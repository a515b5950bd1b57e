"""Loss curves: valid drawings for any run."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from vistune.quickstart.charts import loss_curve, nice_ticks, smoothed


@pytest.mark.parametrize("num", [1, 2, 3, 50, 5000])
def test_any_number_of_steps_stays_inside_the_frame(num: int) -> None:
    losses = [10.0 / (k + 1) + 0.5 for k in range(num)]
    svg = loss_curve(list(range(1, num + 1)), losses, title="a < b")
    root = ET.fromstring(svg)
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for path in root.iter("path"):
        points = [tuple(map(float, p.split())) for p in re.split("[ML]", path.attrib["d"])[1:]]
        assert len(points) <= 802
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert root.attrib["aria-label"].startswith("a < b: from")


def test_no_steps_no_picture() -> None:
    assert loss_curve([], [], title="x") == ""


def test_a_lower_loss_is_lower_on_the_page() -> None:
    root = ET.fromstring(loss_curve([1, 2], [4.0, 1.0], title="x"))
    raw = next(p for p in root.iter("path") if p.attrib["class"] == "raw").attrib["d"]
    (_, first), (_, last) = (tuple(map(float, p.split())) for p in re.split("[ML]", raw)[1:])
    assert last > first


def test_smoothing_keeps_constants_and_means() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smoothed([1.0, 3.0]) == [1.0, 3.0]
    values = [float(k % 2) for k in range(200)]
    assert all(abs(v - 0.5) < 0.1 for v in smoothed(values)[10:-10])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 9.7), (1, 320), (0, 0.003), (5, 6)])
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 6
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1

"""Loss curves as inline SVG, drawn by hand so that they follow the page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 14, 34
_MAX_POINTS = 400
_SMOOTHING_FRAC = 0.05


def loss_curve(steps: Sequence[int], losses: Sequence[float], *, title: str) -> str:
    """Returns an SVG of the loss over optimizer steps: every step faint, the smoothed curve bold.

    Args:
        steps: Optimizer steps, rising.
        losses: Loss of each, nats per target token.
        title: What the picture shows, for screen readers.
    """
    if not steps:
        return ""
    smooth = smoothed(losses)
    # A first step far above the rest would flatten the curve; what lies above the frame is cut.
    shown = sorted(losses)
    top = min(max(losses), shown[int(0.98 * (len(shown) - 1))] * 1.25)
    ticks = nice_ticks(0.0, max(top, max(smooth)), 4)
    high = ticks[-1]
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        inside = _HEIGHT - _TOP - _BOTTOM
        return _TOP + (1 - min(loss, high) / high) * inside

    def path(values: Sequence[float]) -> str:
        chosen = range(0, len(values), max(1, len(values) // _MAX_POINTS))
        indices = sorted({*chosen, len(values) - 1})
        return "M" + "L".join(f"{x(steps[i]):.1f} {y(values[i]):.1f}" for i in indices)

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    )
    bottom = _HEIGHT - _BOTTOM + 18
    marks = [t for t in nice_ticks(first, last, 4) if first <= t <= last and t == int(t)]
    axis = "".join(
        f'<text class="tick" x="{x(t):.1f}" y="{bottom}" text-anchor="middle">{t:g}</text>'
        for t in marks
    )
    end = smooth[-1]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: from '
        f'{losses[0]:.2f} to {end:.2f}">{grid}{axis}'
        f'<path class="raw" d="{path(losses)}"/><path class="smooth" d="{path(smooth)}"/>'
        f'<circle class="end" cx="{x(last):.1f}" cy="{y(end):.1f}" r="3.5"/>'
        f'<text class="value" x="{_WIDTH - _RIGHT}" y="{y(end) - 9:.1f}" text-anchor="end">'
        f"{end:.2f}</text></svg>"
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns the mean of each value and its neighbours, a twentieth of the curve in all."""
    half = int(_SMOOTHING_FRAC * len(values) / 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ranges = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ranges]


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """Returns about `num` + 1 round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    magnitude = 10 ** math.floor(math.log10(span / num))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * num >= span)
    start = math.floor(low / step)
    stop = math.ceil(high / step)
    return [round(k * step, 10) for k in range(start, stop + 1)]

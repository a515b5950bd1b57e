"""A picture of two loss curves and of what lies between them. It computes nothing new."""

from __future__ import annotations

from pathlib import Path

from vistune.compare.curves import CurveComparison
from vistune.errors import DataError

_KINDS = (".png", ".svg", ".pdf")


def plot_runs(comparison: CurveComparison, path: Path, *, names: tuple[str, str]) -> None:
    """Draws both curves, and below them B's relative residual at each step.

    Args:
        comparison: The curves.
        path: Where the picture goes; its suffix says of which kind.
        names: What to call A and B.

    Raises:
        DataError: No such kind of picture is drawn.
    """
    if path.suffix not in _KINDS:
        raise DataError(
            "the suffix names no kind of picture",
            where=str(path),
            expected=", ".join(_KINDS),
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(comparison.steps, comparison.losses_a, color="#4b5563", lw=1.6, label=names[0])
    above.plot(comparison.steps, comparison.losses_b, color="#d9622b", lw=0.8, label=names[1])
    above.set_ylabel("loss, nats per token")
    above.legend(frameon=False)
    percent = [100 * residual for residual in comparison.residuals]
    below.axhline(0, color="#9ca3af", lw=0.8)
    below.plot(comparison.steps, percent, color="#d9622b", lw=0.8)
    below.set_ylabel("difference, %")
    below.set_xlabel(
        f"step; mean difference {100 * comparison.mean_error:.2g} %,"
        f" with signs {100 * comparison.mean_residual:+.2g} %"
    )
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

"""Histograms of a dataset, as text for a terminal, as SVG for a page, and as a picture file."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from vistune.data.stats import DataStats, Distribution
from vistune.errors import DataError

_BLOCKS = " ▏▎▍▌▋▊▉█"
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
"""The first that has a character draws it; those that are not installed are left out."""
_WIDTH, _HEIGHT = 960, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 18, 26


def text_histogram(found: Distribution, *, width: int = 40, max_bins: int = 16) -> Iterator[str]:
    """Yields a histogram line by line: bin, bar, count.

    Args:
        found: The values.
        width: Characters of the longest bar.
        max_bins: Most lines.
    """
    histogram = found.histogram(max_bins=max_bins)
    most = max(histogram.counts.tolist(), default=0)
    labels = [histogram.label(k) for k in range(histogram.counts.size)]
    wide = max(map(len, labels), default=0)
    for label, count in zip(labels, histogram.counts.tolist(), strict=True):
        eighths = round(8 * width * count / most) if count else 0
        eighths = max(eighths, 1) if count else 0  # what is there is seen
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        yield f"{label:>{wide}}  {bar:<{width}}  {count:,}"


def svg_histogram(found: Distribution) -> str:
    """Returns a histogram as inline SVG; its colours are the page's (class "bar" and "tick").

    Args:
        found: The values.
    """
    histogram = found.histogram()
    counts = histogram.counts.tolist()
    if not counts:
        return ""
    most, number = max(counts), len(counts)
    step = (_WIDTH - _LEFT - _RIGHT) / number
    inside = _HEIGHT - _TOP - _BOTTOM
    bars = []
    for k, count in enumerate(counts):
        height = max(1.0, inside * count / most) if count else 0.0
        bars.append(
            f'<rect class="bar" x="{_LEFT + k * step:.1f}" y="{_TOP + inside - height:.1f}"'
            f' width="{max(step - 1, 0.5):.1f}" height="{height:.1f}">'
            f"<title>{histogram.label(k)}: {count:,}</title></rect>"
        )
    ticks = []
    for k in sorted({0, number // 4, number // 2, 3 * number // 4, number - 1}):
        last = k == number - 1
        text = f"{int(histogram.edges[k]):,}" + ("+" if last and histogram.cut else "")
        anchor = "start" if k == 0 else "end" if last else "middle"
        x = _LEFT + k * step + (0 if k == 0 else step if last else step / 2)
        ticks.append(
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text}</text>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(found.name)}">'
        f'<text class="tick" x="{_LEFT}" y="12">most in a bar: {most:,}</text>'
        f"{''.join(bars)}{''.join(ticks)}</svg>"
    )


def plot(stats: DataStats, path: Path, *, title: str) -> None:
    """Draws the distributions of a dataset into a picture file.

    Args:
        stats: What is drawn.
        path: A .png, .svg or .pdf file.
        title: Heading.

    Raises:
        DataError: The file's kind is not known, or there is nothing to draw.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise DataError(
            "the plot's ending does not say its kind",
            where=str(path),
            expected="a name that ends in .png, .svg or .pdf",
        )
    drawn = [found for found in stats.distributions if found.values.size]
    if not drawn:
        raise DataError("no row can be used, so there is nothing to draw", where=title)
    import matplotlib
    from matplotlib.font_manager import get_font_names

    known = set(get_font_names())
    with matplotlib.rc_context({"font.family": [f for f in _FONTS if f in known] or "sans-serif"}):
        _draw(drawn, path, title=title)


def _draw(drawn: list[Distribution], path: Path, *, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 2.6 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for found, axes in zip(drawn, figure.subplots(len(drawn), squeeze=False)[:, 0], strict=True):
        histogram = found.histogram(max_bins=60)
        low, width = histogram.edges[:-1], histogram.edges[1] - histogram.edges[0]
        axes.bar(low, histogram.counts, width=0.95 * width, align="edge", color="#3a5ba9")
        spread = found.spread()
        axes.axvline(spread["p50"], color="#b3541e", linestyle="--", linewidth=1)
        note = f"median {spread['p50']:,.0f}, mean {spread['mean']:,.1f}, max {spread['max']:,.0f}"
        axes.set_title(f"{found.name}: {note}", fontsize="medium", loc="left")
        axes.set_ylabel("rows" if "row" in found.name else "images")
        for axis in (axes.xaxis, axes.yaxis):  # all that is drawn is counted: no half rounds
            axis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        if histogram.cut:
            axes.set_xlabel("the last bar holds all above it", fontsize="small")
    figure.savefig(path, dpi=120)

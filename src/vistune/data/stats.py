"""What a dataset is made of, in numbers: how long its rows are, how many images, of which size.

`stats_of_report` takes what a check counted (tokens need a model), `stats_of_source` what one file
says by itself (characters, rounds, image sizes from headers). Plots are `plots`'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.formats import RowReader
from vistune.data.image import ImagePlan, probe
from vistune.data.report import CheckReport
from vistune.errors import RowError

_PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass(frozen=True)
class Distribution:
    """Values of one kind, one for every row or image.

    Args:
        name: What is counted ("tokens per row").
        values: int64 [R].
    """

    name: str
    values: npt.NDArray[np.int64]

    def spread(self) -> dict[str, float]:
        """Returns mean and percentiles; empty where there is no value."""
        if not self.values.size:
            return {}
        points = np.percentile(self.values, list(_PERCENTILES.values()), method="nearest")
        named = dict(zip(_PERCENTILES, (float(p) for p in points), strict=True))
        return {**named, "mean": round(float(self.values.mean()), 2)}

    def histogram(self, *, max_bins: int = 40) -> Histogram:
        """Returns counts in bins of one whole width; the last bin also holds the top 0.5 %.

        Args:
            max_bins: Most bins there may be.
        """
        if not self.values.size:
            return Histogram(np.zeros(1, np.int64), np.zeros(0, np.int64), cut=False)
        low, high = int(self.values.min()), int(self.values.max())
        top = int(np.percentile(self.values, 99.5, method="higher"))
        # A few giants would flatten all others.
        cut = high - low >= max_bins and high > top + (top - low) // 2
        end = top if cut else high
        width = _round_width((end - low + 1) / max_bins)
        first = low // width * width
        number = (end - first) // width + 1
        edges = first + width * np.arange(number + 1, dtype=np.int64)
        bins = np.minimum((self.values - first) // width, number - 1)
        return Histogram(edges, np.bincount(bins, minlength=number).astype(np.int64), cut=cut)


@dataclass(frozen=True)
class Histogram:
    """Counts by bin.

    Args:
        edges: int64 [B + 1]; bin b holds values from edges[b] to edges[b + 1] - 1.
        counts: int64 [B].
        cut: Whether the last bin also holds all that lies above it.
    """

    edges: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    cut: bool

    def label(self, bin: int) -> str:
        """Returns what a bin holds, as text."""
        low, high = int(self.edges[bin]), int(self.edges[bin + 1]) - 1
        if self.cut and bin + 1 == self.counts.size:
            return f"{low:,} and more"
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@dataclass
class SourceStats:
    """Sums of one source.

    Args:
        name: Its name.
        num_rows: Rows in it.
        num_ok: Usable rows among them.
        num_images: Images of usable rows; None where not counted by source.
        num_tokens: Tokens of usable rows; None where no tokenizer is known.
        num_image_tokens: Image tokens among them.
    """

    name: str
    num_rows: int
    num_ok: int
    num_images: int | None = None
    num_tokens: int | None = None
    num_image_tokens: int | None = None


@dataclass
class DataStats:
    """What a dataset is made of.

    Args:
        sources: Sums by source.
        distributions: Values by kind.
        counts: Counts by name (notes, scripts, image formats).
        by_reason: Unusable rows by reason.
    """

    sources: list[SourceStats]
    distributions: list[Distribution] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it in JSON's types; distributions as a few numbers and a histogram."""
        return {
            "sources": [vars(source) for source in self.sources],
            "distributions": {
                found.name: {
                    **found.spread(),
                    "edges": found.histogram().edges.tolist(),
                    "counts": found.histogram().counts.tolist(),
                }
                for found in self.distributions
            },
            "counts": self.counts,
            "by_reason": self.by_reason,
        }


def stats_of_report(report: CheckReport) -> DataStats:
    """Returns the statistics of checked sources.

    Args:
        report: From `check_sources`.
    """
    sources, start = [], 0
    for name, rows, accepted in zip(report.sources, report.num_rows, report.accepted, strict=True):
        mine = slice(start, start + accepted.size)
        start += accepted.size
        sources.append(
            SourceStats(
                name=name,
                num_rows=rows,
                num_ok=int(accepted.size),
                num_tokens=int(report.lengths[mine].sum(dtype=np.int64)),
                num_image_tokens=int(report.image_tokens[mine].sum(dtype=np.int64)),
            )
        )
    images = report.image_tokens.astype(np.int64)
    lengths = report.lengths.astype(np.int64)
    found = [Distribution("tokens per row", lengths)]
    if images.any():
        found.append(Distribution("text tokens per row", lengths - images))
        found.append(Distribution("image tokens per row", images))
    counts = {"remarks": dict(report.notes), "main script": dict(report.scripts)}
    return DataStats(sources, found, _without_empty(counts), report.by_reason())


def stats_of_source(
    reader: RowReader,
    plan: ImagePlan,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DataStats:
    """Returns the statistics of one source, from text and image headers.

    Args:
        reader: The source.
        plan: Carries the limit on the number of pixels.
        progress: Told (rows done, rows in all).
    """
    characters, rounds, images = [], [], []
    widths: list[int] = []
    heights: list[int] = []
    reasons: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for row in range(len(reader)):
        if progress is not None and (row % 256 == 0 or row + 1 == len(reader)):
            progress(row + 1, len(reader))
        try:
            sample = reader.read(row)
            sizes = [probe(image, plan) for image in sample.images]
        except RowError as error:
            reasons[error.reason] += 1
            continue
        characters.append(sum(len(turn.text) for turn in sample.turns))
        rounds.append(sum(turn.speaker == "user" for turn in sample.turns))
        images.append(len(sizes))
        heights += [height for height, _ in sizes]
        widths += [width for _, width in sizes]
        notes.update(sample.notes)
    named = {
        "characters per row": characters,
        "rounds per row": rounds,
        "images per row": images,
        "image width, px": widths,
        "image height, px": heights,
    }
    total = SourceStats(reader.name, len(reader), len(rounds), num_images=len(widths))
    return DataStats(
        [total],
        [Distribution(name, np.array(v, dtype=np.int64)) for name, v in named.items() if v],
        _without_empty({"remarks": dict(notes)}),
        dict(reasons.most_common()),
    )


def _without_empty(counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {name: values for name, values in counts.items() if values}


def _round_width(least: float) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10

"""Numbers of a dataset, and how they are drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_encoder, make_images, make_plan, talk, write_rows
from PIL import Image

from vistune.data.check import check_sources
from vistune.data.formats import open_source
from vistune.data.plots import plot, svg_histogram, text_histogram
from vistune.data.stats import DataStats, Distribution, stats_of_report, stats_of_source
from vistune.errors import DataError
from vistune.recipe import SourceConfig


def values(*numbers: int) -> Distribution:
    return Distribution("tokens per row", np.array(numbers, dtype=np.int64))


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    make_images(tmp_path, 2, size=(40, 30))
    Image.new("RGB", (10, 70)).save(tmp_path / "tall.png")
    rows = [
        {"image": "0.jpg", "conversations": talk("<image>\nWho?", "A cat.", "Sure?", "Yes.")},
        {"image": ["1.jpg", "tall.png"], "conversations": talk("<image><image>", "Two.")},
        {"image": "none.jpg", "conversations": talk("<image>", "Nobody.")},
    ]
    first = write_rows(tmp_path, rows, "a.jsonl")
    second = write_rows(tmp_path, [{"conversations": talk("你好", "你好！")}] * 2, "b.jsonl")
    return [SourceConfig(path=str(path)) for path in (first, second)]


def test_of_a_report(sources: list[SourceConfig]) -> None:
    encoder = make_encoder()
    report = check_sources(sources, encoder, max_tokens=400, overlong="drop")
    stats = stats_of_report(report)
    expected = [
        [encoder.tokenise(open_source(source).read(row)) for row in rows]
        for source, rows in zip(sources, ((0, 1), (0, 1)), strict=True)
    ]
    for part, tokens in zip(stats.sources, expected, strict=True):
        assert part.num_tokens == sum(t.ids.size for t in tokens)
        assert part.num_image_tokens == sum(t.num_image_tokens for t in tokens)
    assert [(p.name, p.num_rows, p.num_ok) for p in stats.sources] == [("a", 3, 2), ("b", 2, 2)]
    assert stats.by_reason == {"image_missing": 1}
    by_name = {found.name: found.values.tolist() for found in stats.distributions}
    assert by_name["image tokens per row"] == [4, 8, 0, 0]
    assert by_name["tokens per row"] == report.lengths.tolist()
    json.dumps(stats.to_json())


def test_of_a_source_without_a_tokenizer(sources: list[SourceConfig]) -> None:
    stats = stats_of_source(open_source(sources[0]), make_plan())
    by_name = {found.name: found.values.tolist() for found in stats.distributions}
    assert by_name == {
        "characters per row": [len("\nWho?A cat.Sure?Yes."), len("Two.")],
        "rounds per row": [2, 1],
        "images per row": [1, 2],
        "image width, px": [40, 40, 10],
        "image height, px": [30, 30, 70],
    }
    assert (stats.sources[0].num_images, stats.sources[0].num_tokens) == (3, None)
    assert stats.by_reason == {"image_missing": 1}


def test_every_value_is_in_one_bin() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 50, 3000):
        drawn = np.exp(rng.normal(5, 1, size)).astype(np.int64)
        histogram = values(*drawn.tolist()).histogram()
        assert histogram.counts.sum() == size
        assert histogram.counts.size <= 41
        widths = np.diff(histogram.edges)
        assert set(widths.tolist()) <= {10**k * f for k in range(6) for f in (1, 2, 5)}
        if not histogram.cut:
            counts, _ = np.histogram(drawn, bins=histogram.edges - 0.5)
            np.testing.assert_array_equal(counts, histogram.counts)


def test_giants_do_not_flatten_the_rest() -> None:
    histogram = values(*range(1000), 10**9).histogram()
    assert histogram.cut
    assert histogram.edges[-1] < 2000
    assert histogram.label(histogram.counts.size - 1).endswith("and more")
    assert histogram.counts[-1] >= 1
    assert not values(*range(1000)).histogram().cut


def test_text_histogram_shows_what_is_there() -> None:
    lines = list(text_histogram(values(*[1] * 1000, 3), width=10))
    assert [line.split()[-1] for line in lines] == ["1,000", "0", "1"]
    assert [line.count("█") for line in lines] == [10, 0, 0]
    assert "▏" in lines[2]  # one of a thousand still leaves a mark


def test_svg_stands_alone() -> None:
    svg = svg_histogram(values(5, 5, 9))
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', svg)]
    assert len(heights) == 5
    assert heights[0] == max(heights) == 2 * heights[-1] > 0
    assert heights[1:4] == [0, 0, 0]
    assert "5: 2" in svg
    assert svg_histogram(values()) == ""


def test_plots(tmp_path: Path) -> None:
    stats = DataStats([], [values(1, 2, 2), Distribution("image width, px", np.array([40, 50]))])
    plot(stats, tmp_path / "a.png", title="数据")
    with Image.open(tmp_path / "a.png") as drawn:
        assert len(set(drawn.convert("RGB").resize((60, 60)).getdata())) > 20
    plot(stats, tmp_path / "a.svg", title="data")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(DataError, match="ending"):
        plot(stats, tmp_path / "a.txt", title="data")
    with pytest.raises(DataError, match="nothing to draw"):
        plot(DataStats([]), tmp_path / "b.png", title="data")

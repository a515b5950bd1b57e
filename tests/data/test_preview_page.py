"""The preview's page, as text and as a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_encoder, make_plan
from PIL import Image

from vistune.data.preview import Preview, preview_sample, preview_text
from vistune.data.preview_page import to_html
from vistune.data.stats import DataStats, Distribution, SourceStats
from vistune.types import ImageRef, Sample, Turn

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
RED, LEARNT, UNDERLINE = (200, 10, 20), (0xCD, 0xEE, 0xD7), (0x0A, 0x3D, 0x1F)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    Image.new("RGB", (28, 28), RED).save(tmp_path / "red.png")
    turns = (
        Turn("system", ("Be <brief>.",)),
        Turn("user", (0, "\nWhat is it?")),
        Turn("assistant", ("公园里有三只狗 & a <script>alert(1)</script>",)),
    )
    image = ImageRef(tmp_path / "red.png", "red.png")
    return Sample("row <1>", "train", "t.jsonl:1", turns, (image,))


def stats(**change: int | None) -> DataStats:
    source = SourceStats("train", num_rows=1200, num_ok=1100, **change)
    found = Distribution("tokens per row", np.arange(100, 1200, dtype=np.int64))
    return DataStats([source], [found])


@pytest.fixture
def preview(sample: Sample) -> Preview:
    return preview_sample(make_encoder(), sample, max_tokens=400, overlong="error")


def test_table_histogram_and_refusals(preview: Preview) -> None:
    page = to_html(
        [preview],
        title="T",
        stats=stats(num_tokens=5000, num_image_tokens=400),
        refused=["row 3: <bad>"],
    )
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", page)
    names = ["source", "rows", "usable", "unusable", "tokens", "image tokens"]
    assert cells == [*names, "train", "1,200", "1,100", "100", "5,000", "400"]
    assert page.count("<rect") > 10
    assert "row 3: &lt;bad&gt;" in page
    assert "<script" not in page


def test_without_tokens_turns_are_shown(sample: Sample) -> None:
    shown = preview_text(sample, make_plan())
    assert shown.target_text == "公园里有三只狗 & a <script>alert(1)</script>"
    page = to_html([shown], title="T", stats=stats(num_images=7))
    assert "token" not in page.partition("</style>")[2].replace("tokens per row", "")
    assert '<span class="p s">assistant: </span>' in page
    assert '<span class="i">image 1</span>' in page


def test_what_is_learnt_is_marked_by_more_than_colour(preview: Preview) -> None:
    style = re.search(r"\.t\{([^}]*)\}", to_html([preview], title="T"))
    assert style is not None
    assert "border-bottom" in style[1]
    assert "font-weight" in style[1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_it(tmp_path: Path, preview: Preview) -> None:
    page, shot = tmp_path / "p.html", tmp_path / "p.png"
    page.write_text(to_html([preview], title="T", stats=stats()), encoding="utf-8")
    assert CHROMIUM is not None
    run = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900"]
    run += ["--blink-settings=preferredColorScheme=1", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(run, check=True, capture_output=True, timeout=60)
    with Image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)

    def places(colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        return np.nonzero((np.abs(pixels - colour) <= 3).all(axis=2))

    rows, columns = places(RED)  # the picture, 28 px wide, drawn 14 rem wide
    assert rows.max() - rows.min() > 200
    assert columns.max() - columns.min() > 200
    top, left = rows.min(), columns.max()
    rows, columns = places(LEARNT)
    beside = (rows > top) & (columns > left)  # the key has the same colour, further up
    assert beside.sum() > 500
    lines, _ = places(UNDERLINE)
    under = np.bincount(lines[lines > top], minlength=1)
    assert under.max() > 100  # a line under many characters, not their strokes
    bars = places((0x3A, 0x5B, 0xA9))[0]
    assert (bars < top).sum() > 5000  # the histogram

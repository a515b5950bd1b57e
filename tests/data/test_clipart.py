"""bench/clipart.py: what it reads out of an SVG, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import clipart

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>Jane Doe</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


def add(
    root: Path,
    name: str,
    box: tuple[int, int, int, int] | None,
    *,
    title: str,
    keywords: str = "glass",
    description: str = "",
) -> None:
    """An SVG and a PNG with an ellipse in a box, none for an empty picture."""
    for kind in ("svg", "png"):
        (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords.split(","))
    (root / "svg" / f"{name}.svg").write_text(
        SVG.format(title=title, keywords=items, description=description)
    )
    image = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    if box:
        ImageDraw.Draw(image).ellipse(box, fill="red")
    image.save(root / "png" / f"{name}.png")


def test_texts_are_read_and_cleaned(tmp_path: Path) -> None:
    add(
        tmp_path,
        "a/flask",
        (0, 0, 9, 9),
        title="Salt &amp;amp; pepper_pot",
        keywords="hash,,Table_Ware,salt,salt,jane doe",
        description="Made with inkscape",
    )
    title, keywords, description, authors = clipart.read_svg(tmp_path / "svg/a/flask.svg")
    assert (title, keywords, description) == ("Salt & pepper pot", ("table ware", "salt"), "")
    # The file's author cut short, and numbers, are no part of what it shows.
    assert clipart.words_of("red_flask_jane_d_01", authors) == "red flask"


@pytest.mark.parametrize("text", ["HASH(0x85caca8)", "me@example.org", "Ã©tÃ©", "...", "Untitled"])
def test_what_is_no_text(text: str) -> None:
    assert clipart.clean(text) == ""


def test_each_picture_and_each_text_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    add(root, "a/flask", (0, 0, 30, 30), title="Flask", description="A red flask")
    add(root, "a/other_text", (0, 0, 30, 30), title="Bottle")
    add(root, "b/other_picture", (50, 9, 89, 50), title="FLASK", description="A red flask")
    add(root, "b/empty", None, title="Nothing")
    for place in range(clipart.SHARED):
        name = f"c/{'abcde'[place] * 3}_jane_d_0{place}"
        add(root, name, (15 * place, 0, 15 * place + 15, 59), title="A set of icons")
    (root / "svg/a/link.svg").symlink_to("flask.svg")
    monkeypatch.setattr("sys.argv", ["clipart.py", str(root), str(out), "--size", "48"])
    clipart.main()
    said = capsys.readouterr().out
    first, second = (json.loads((out / f"stage{stage}.json").read_text()) for stage in (1, 2))
    captions = {row["id"]: row["conversations"][1]["value"] for row in first}
    assert captions.pop("a/flask") == "Flask: glass. A red flask."
    assert sorted(captions.values()) == [f"{c.upper()}{c}{c}: glass." for c in "abcde"]
    turns = next(row for row in second if row["id"] == "a/flask")["conversations"]
    assert [turn["value"] for turn in turns[1::2]] == ["Flask.", "glass.", "A red flask."]
    for reason in ("another name", "the same text", "nearly the same picture", "empty picture"):
        assert any(reason in line and line.endswith(": 1") for line in said.splitlines()), reason
    with Image.open(out / "images/a/flask.jpg") as image:
        assert image.size == (48, 48)
        assert min(image.getpixel((24, 2))) > 240  # the margin above it is white

"""Images with captions: a folder with text files, and a CSV file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_images

from vistune.data.formats import open_source
from vistune.data.formats.captions import CAPTION_QUESTION
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig


def opened(path: Path, format: str, **change: Any) -> Any:
    reader = open_source(SourceConfig(path=str(path), format=format, **change))  # type: ignore[arg-type]
    return pickle.loads(pickle.dumps(reader))


def refusal(reader: Any, row: int) -> str:
    with pytest.raises(RowError) as caught:
        reader.read(row)
    assert caught.value.where == reader.where(row)
    assert caught.value.fix
    return caught.value.reason


# --- a folder -----------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("b", "a.x"):
        (root / name).mkdir(parents=True)
        make_images(root / name, 2)
    (root / "a.x" / "0.txt").write_text("一只猫。\n", encoding="utf-8-sig")
    (root / "a.x" / "1.txt").write_text(" ")
    (root / "b" / "0.txt").write_bytes(b"\xff")
    (root / "b" / "notes.md").write_text("no image")
    (root / "top.PNG").write_bytes(b"not looked at here")
    (root / "top.txt").write_text("A top.")
    reader = opened(root, "image_folder")
    assert (reader.name, len(reader)) == ("photos", 5)
    sample = reader.read(0)
    assert (sample.id, sample.where) == ("a.x/0", "photos/a.x/0.jpg")
    assert sample.turns[0].parts == (0, f"\n{CAPTION_QUESTION}")
    assert sample.turns[1].parts == ("一只猫。",)
    assert sample.images[0].path.is_file()
    assert [refusal(reader, row) for row in (1, 2, 3)] == [
        "empty_answer",
        "not_utf8",
        "caption_missing",
    ]
    assert reader.read(4).id == "top"
    assert len(opened(root, "image_folder", max_rows=2)) == 2


def test_folder_is_not_left_and_not_missed(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    with pytest.raises(DataError, match="holds no image"):
        opened(root, "image_folder")
    make_images(tmp_path, 1)
    os.symlink(tmp_path / "0.jpg", root / "out.jpg")  # noqa: PTH211
    (root / "out.txt").write_text("x")
    assert refusal(opened(root, "image_folder"), 0) == "image_outside_folder"
    with pytest.raises(DataError, match="is not there"):
        opened(tmp_path / "none", "image_folder")
    with pytest.raises(DataError, match="its own folder"):
        opened(root, "image_folder", images=str(root))


# --- CSV ----------------------------------------------------------------------------------


def csv_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.csv"
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def test_csv(tmp_path: Path) -> None:
    make_images(tmp_path, 2)
    text = (
        "\ufefffile_name,text,id,question\r\n"
        '0.jpg,"A cat, ""Tom"",\r\non a mat.",x1,\r\n'
        "\r\n"
        "1.jpg,一只狗。,,Who is it?\r\n"
        "1.jpg,last,x3,"
    )
    reader = opened(csv_file(tmp_path, text), "captions_csv")
    first, second, third = (reader.read(row) for row in range(3))
    assert len(reader) == 3
    assert (first.id, first.where) == ("x1", "c.csv:2")
    assert first.turns[1].parts == ('A cat, "Tom",\r\non a mat.',)
    assert first.turns[0].parts == (0, f"\n{CAPTION_QUESTION}")
    assert (second.id, second.where) == ("c:1", "c.csv:5")
    assert second.turns[0].parts == (0, "\nWho is it?")
    assert second.turns[1].parts == ("一只狗。",)
    assert (third.id, third.turns[1].parts, third.where) == ("x3", ("last",), "c.csv:6")
    assert len(opened(csv_file(tmp_path, text), "captions_csv", max_rows=1)) == 1


def test_tabs_where_the_header_has_them(tmp_path: Path) -> None:
    reader = opened(csv_file(tmp_path, "caption\timage\na, b\t0.jpg\n"), "captions_csv")
    assert reader.read(0).turns[1].parts == ("a, b",)


def test_csv_rows_that_are_refused(tmp_path: Path) -> None:
    rows = [
        b"0.jpg,a,b",
        b"0.jpg",
        b"0.jpg,\xff",
        b"../0.jpg,a",
        b",a",
        b"0.jpg, ",
        b"https://x/y.jpg,a",
        b'0.jpg,"open',
    ]
    reader = opened(csv_file(tmp_path, b"image,caption\n" + b"\n".join(rows)), "captions_csv")
    assert [refusal(reader, row) for row in range(len(rows))] == [
        "broken_csv",
        "broken_csv",
        "not_utf8",
        "image_outside_folder",
        "bad_image_name",
        "empty_answer",
        "image_is_url",
        "broken_csv",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not there, or empty"),
        ("image,caption\n", "no row"),
        ("a,b\n1,2\n", "0 of the columns"),
        ("image,path,caption\n1,2,3\n", "2 of the columns"),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(csv_file(tmp_path, text), "captions_csv")

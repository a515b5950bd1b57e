"""Parquet rows: the same formats, images as bytes or names, any row at once."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_encoder, make_images, make_plan, talk

from vistune.data.check import check_sources
from vistune.data.formats import open_source
from vistune.data.formats.parquet_rows import ParquetRows
from vistune.data.image import load
from vistune.errors import DataError, MissingExtraError, RowError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def opened(path: Path, format: str, **change: Any) -> Any:
    reader = open_source(SourceConfig(path=str(path), format=format, **change))  # type: ignore[arg-type]
    return pickle.loads(pickle.dumps(reader))


def test_messages_with_images_as_the_hub_writes_them(tmp_path: Path) -> None:
    names = make_images(tmp_path, 2)
    raw = [(tmp_path / name).read_bytes() for name in names]
    asked = [{"type": "image"}, {"type": "text", "text": "Who is it?"}]
    rows = [
        {
            "id": k,
            "messages": [{"role": "user", "content": asked}, ANSWER],
            "images": [{"bytes": raw[k], "path": f"cats/{k}.jpg" if k else None}],
        }
        for k in range(2)
    ]
    reader = opened(write(tmp_path / "t.parquet", rows), "messages")
    assert len(reader) == 2
    first, second = reader.read(0), reader.read(1)
    assert (first.id, first.where) == ("0", "t.parquet row 0")
    assert first.turns[0].parts == (0, "Who is it?")
    assert [first.images[0].name, second.images[0].name] == [
        "t.parquet row 0 image 0",
        "cats/1.jpg",
    ]
    expected = load(ImageRef(tmp_path / names[1], "x"), make_plan())
    np.testing.assert_array_equal(
        np.asarray(load(second.images[0], make_plan())), np.asarray(expected)
    )


def test_image_parts_with_bytes_and_rows_with_names(tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    part = {"type": "image", "image": {"bytes": b"raw", "path": None}, "text": None}
    text = {"type": "text", "image": None, "text": "Who?"}
    turns = [{"role": "user", "content": [text, part]}, ANSWER]
    reader = opened(write(tmp_path / "a.parquet", [{"messages": turns}]), "messages")
    assert reader.read(0).images[0].content == b"raw"
    assert reader.read(0).turns[0].parts == ("Who?", 0)
    row = {"image": "0.jpg", "conversations": talk("<image>\nWho?", "A cat.")}
    reader = opened(write(tmp_path / "b.parquet", [row]), "llava")
    assert reader.read(0).images[0].path.is_file()
    rows = [{"image": b"raw", "conversations": talk("<image>\nWho?", "A cat.")}]
    assert opened(write(tmp_path / "c.parquet", rows), "llava").read(0).images[0].content == b"raw"


def test_any_row_of_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for k, number in enumerate((50, 0, 33)):
        rows = [{"id": f"{k}-{i}", "conversations": talk("Hi", f"{i}")} for i in range(number)]
        table = pa.Table.from_pylist(rows or [{"id": "x", "conversations": talk("a", "b")}])
        pq.write_table(table.slice(0, number), folder / f"{k}.parquet", row_group_size=20)
    (folder / "readme.md").write_text("x")
    reader = opened(folder, "sharegpt")
    assert len(reader) == 83
    for row, id, where in (
        (82, "2-32", "2.parquet row 32"),
        (0, "0-0", "0.parquet row 0"),
        (49, "0-49", "0.parquet row 49"),
        (50, "2-0", "2.parquet row 0"),
    ):
        sample = reader.read(row)
        assert (sample.id, sample.where, sample.turns[1].text) == (id, where, id.split("-")[1])
    assert len(opened(folder, "sharegpt", max_rows=3)) == 3


def test_a_file_is_unpacked_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"conversations": talk("Hi", "one")}])
    cache = tmp_path / "cache" / "vistune" / "rows"
    assert opened(path, "llava").read(0).turns[1].text == "one"
    before = {file: file.stat().st_ino for file in cache.iterdir()}
    assert opened(path, "llava").read(0).turns[1].text == "one"
    assert {file: file.stat().st_ino for file in cache.iterdir()} == before
    write(path, [{"conversations": talk("Hi", "two")}])
    os.utime(path, ns=(1, 1))
    assert opened(path, "llava").read(0).turns[1].text == "two"
    assert len(list(cache.iterdir())) == 2


def test_check_reads_it_in_processes(tmp_path: Path) -> None:
    raw = (tmp_path / make_images(tmp_path, 1)[0]).read_bytes()
    rows = [
        {"image": {"bytes": raw if k % 5 else b"no"}, "conversations": talk("<image>\nQ", "A.")}
        for k in range(300)
    ]
    path = write(tmp_path / "t.parquet", rows)
    source = SourceConfig(path=str(path), format="llava")
    report = check_sources(
        [source], make_encoder(), max_tokens=400, overlong="drop", deep=True, workers=2
    )
    assert (report.num_ok, report.by_reason()) == (240, {"image_unreadable": 60})
    assert report.rejected[1].where == "t.parquet row 5"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", [{"image": 3, "conversations": talk("<image>", "a")}])
    with pytest.raises(RowError) as caught:
        opened(path, "llava").read(0)
    assert caught.value.reason == "bad_image_name"
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path / "cut.parquet", "llava")
    assert not list((tmp_path / "cache" / "vistune" / "rows").glob("*.part"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="pyarrow") as missing:
        ParquetRows(path)
    assert "vistune[parquet]" in str(missing.value)

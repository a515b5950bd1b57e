"""A source is checked without a model: the same by one process and by several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_images, make_plan, talk, write_rows
from PIL import Image

from vistune.data import check_rows as module
from vistune.data.check_rows import check_rows
from vistune.data.formats import RowReader, open_source
from vistune.errors import DataError
from vistune.recipe import SourceConfig


@pytest.fixture
def reader(tmp_path: Path) -> RowReader:
    names = make_images(tmp_path, 6)
    with Image.open(tmp_path / "1.jpg") as image:
        image.save(tmp_path / "same.png")
    rows: list[Any] = [
        {"id": k, "image": name, "conversations": talk("<image>\nWhat?", f"No. {k}.")}
        for k, name in enumerate(names)
    ]
    rows += [
        {"id": 3, "image": "same.png", "conversations": talk("<image>", "Again.")},
        {"id": 7, "image": "1.jpg", "conversations": talk("<image>\nWhat?", "No. 1.")},
        {"id": 8, "conversations": talk("你好", "你好。")},
        {"id": 9, "conversations": talk("?", "and so on " * 40)},
        {"id": 10, "image": "gone.jpg", "conversations": talk("<image>", "x")},
        b"{broken",
    ]
    return open_source(SourceConfig(path=str(write_rows(tmp_path, rows))))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_found(
    reader: RowReader, monkeypatch: pytest.MonkeyPatch, deep: bool, workers: int
) -> None:
    monkeypatch.setattr(module, "_UNIT_ROWS", 5)
    monkeypatch.setattr(module, "_DEEP_UNIT_ROWS", 5)
    told: list[tuple[int, int]] = []
    report = check_rows(
        reader,
        make_plan(),
        deep=deep,
        workers=workers,
        progress=lambda done, total: told.append((done, total)),
    )
    assert (report.num_rows, report.num_ok, report.num_images, report.num_turns) == (12, 10, 8, 20)
    assert report.by_reason() == {"image_missing": 1, "broken_json": 1}
    assert [row.where for row in report.rejected] == ["train.jsonl:11", "train.jsonl:12"]
    expected = {"duplicate_id": 1, "duplicate_row": 1, "answer_seems_cut_off": 1}
    assert report.notes == expected | ({"duplicate_image": 1} if deep else {})
    assert report.note_rows["duplicate_id"] == ["train.jsonl:7 (id 3)"]
    assert report.note_rows["duplicate_row"] == ["train.jsonl:8 (id 7)"]
    if deep:
        assert report.note_rows["duplicate_image"] == ["train.jsonl:7 (id 3)"]
    assert report.scripts == {"latin": 9, "chinese": 1}
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_a_process_that_dies_is_a_clear_error(
    reader: RowReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNIT_ROWS", 5)
    monkeypatch.setattr(module._Look, "rows", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="process that checked rows died"):
        check_rows(reader, make_plan(), workers=2)

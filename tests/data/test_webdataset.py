"""Rows in tar shards: read in place, images by offset, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_images, make_plan, talk

from vistune.data.formats import open_source
from vistune.data.formats.captions import CAPTION_QUESTION
from vistune.data.image import load, probe
from vistune.errors import DataError, ImageError, RowError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef, Sample


def shard(path: Path, members: dict[str, bytes | str | dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content, ensure_ascii=False)
            raw = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def opened(path: Path, **change: Any) -> Any:
    reader = open_source(SourceConfig(path=str(path), format="webdataset", **change))
    return pickle.loads(pickle.dumps(reader))


@pytest.fixture
def photos(tmp_path: Path) -> list[bytes]:
    return [(tmp_path / name).read_bytes() for name in make_images(tmp_path, 3)]


def shown(sample: Sample) -> list[tuple[Any, ...]]:
    return [turn.parts for turn in sample.turns]


def test_golden_rows(tmp_path: Path, photos: list[bytes]) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "谁？"}]}
    rows = {
        "./cats/0001.jpg": photos[0],
        "./cats/0001.txt": "A cat.\n",
        "./cats/0001.cls": "3",
        "0002.a.jpg": photos[1],
        "0002.b.PNG": photos[2],
        "0002.json": {
            "id": 7,
            "image": ["x/0002.b.PNG", "a.jpg"],
            "conversations": talk("<image> or <image>?", "One."),
        },
        ".hidden": "x",
        "0003.jpg": photos[2],
        "0003.json": {"messages": [message, {"role": "assistant", "content": "猫"}]},
        "0004.json": {"conversations": talk("Hi", "Hello")},
    }
    reader = opened(shard(tmp_path / "s.tar", rows))
    assert (reader.name, len(reader)) == ("s", 4)
    first, second, third, fourth = (reader.read(row) for row in range(4))
    assert (first.id, first.where) == ("cats/0001", "s.tar/cats/0001")
    assert shown(first) == [(0, f"\n{CAPTION_QUESTION}"), ("A cat.",)]
    assert (second.id, shown(second)[0]) == ("7", (0, " or ", 1, "?"))
    names = [image.name for image in second.images]
    assert names == ["s.tar/0002.b.PNG", "s.tar/0002.a.jpg"]
    assert shown(third) == [(0, "谁？"), ("猫",)]
    assert fourth.images == ()
    plan = make_plan()
    for ref, raw in ((first.images[0], photos[0]), (second.images[0], photos[2])):
        (tmp_path / "x.jpg").write_bytes(raw)
        expected = load(ImageRef(tmp_path / "x.jpg", "x"), plan)
        assert probe(ref, plan) == (30, 40)
        np.testing.assert_array_equal(np.asarray(load(ref, plan)), np.asarray(expected))


def test_a_folder_of_shards_and_max_rows(tmp_path: Path) -> None:
    talked = {"conversations": talk("Hi", "Hello")}
    for k in range(3):
        shard(tmp_path / f"{k}.tar", {f"{k}a.json": talked, f"{k}b.json": talked})
    reader = opened(tmp_path)
    assert [reader.read(row).id for row in range(6)] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert reader.where(3) == "1.tar/1b"
    assert len(opened(tmp_path, max_rows=3)) == 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"1.jpg": b"x"}, "caption_missing"),
    ({"1.jpg": b"x", "1.txt": "a", "1.json": "{}"}, "several_texts"),
    ({"1.txt": "a"}, "image_count_mismatch"),
    ({"1.jpg": b"x", "1.txt": " "}, "empty_answer"),
    ({"1.jpg": b"x", "1.txt": b"\xff"}, "not_utf8"),
    ({"1.json": "{"}, "broken_json"),
    ({"1.json": '"\\ud800"'}, "broken_json"),
    ({"1.json": {"caption": "a"}}, "no_conversation"),
    (
        {"1.jpg": b"x", "1.json": {"image": "2.jpg", "conversations": talk("<image>", "b")}},
        "image_missing",
    ),
    ({"1.jpg": b"x", "1.json": {"conversations": talk("a", "b")}}, "image_not_in_text"),
]


@pytest.mark.parametrize(("members", "reason"), BAD)
def test_what_is_refused(tmp_path: Path, members: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        opened(shard(tmp_path / "s.tar", members)).read(0)
    assert (caught.value.reason, caught.value.where) == (reason, "s.tar/1")
    assert caught.value.fix


def test_broken_members_are_named(tmp_path: Path, photos: list[bytes]) -> None:
    rows = {"1.jpg": b"", "1.txt": "a", "2.jpg": photos[0][:-300], "2.txt": "b"}
    reader = opened(shard(tmp_path / "s.tar", rows))
    for row, reason in ((0, "image_empty"), (1, "image_truncated")):
        with pytest.raises(ImageError) as caught:
            probe(reader.read(row).images[0], make_plan())
        assert caught.value.reason == reason
        assert caught.value.where == f"s.tar/{row + 1}.jpg"


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"\x1f\x8b" + b"0" * 600)
    with pytest.raises(DataError, match="no plain tar file"):
        opened(tmp_path / "s.tar")
    with pytest.raises(DataError, match="no tar file is there"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="holds no row"):
        opened(shard(tmp_path / "e.tar", {}))
    with pytest.raises(DataError, match="holds its images itself"):
        opened(shard(tmp_path / "s.tar", {"1.json": "{}"}), images=str(tmp_path))

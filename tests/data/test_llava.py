"""LLaVA rows: what is read, and every row that is not, with its reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_images, talk, write_rows

from vistune.data.formats import FORMATS, open_source
from vistune.errors import DataError, RegistryError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Turn


def read(folder: Path, row: Any, *, name: str = "train.jsonl") -> Any:
    path = write_rows(folder, [row], name)
    return open_source(SourceConfig(path=str(path))).read(0)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_golden_row(tmp_path: Path, name: str) -> None:
    row = {
        "id": "000000033471",
        "image": "coco/a.jpg",
        "model": "",
        "conversations": talk("<image>\nWhat?", "A bus.", "Why?", "It is."),
    }
    sample = read(tmp_path, row, name=name)
    assert (sample.id, sample.source) == ("000000033471", "train")
    assert sample.where == ("train.jsonl:1" if name.endswith("l") else "train.json row 0")
    assert sample.turns == (
        Turn("user", (0, "\nWhat?")),
        Turn("assistant", ("A bus.",)),
        Turn("user", ("Why?",)),
        Turn("assistant", ("It is.",)),
    )
    assert sample.images[0].name == "coco/a.jpg"
    assert sample.images[0].path == Path(os.path.realpath(tmp_path)) / "coco" / "a.jpg"
    assert sample.notes == ()


def test_images_stay_where_they_stand(tmp_path: Path) -> None:
    row = {
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "conversations": talk("Of <image> and <image>, which?", "One.", "And this? <image>", "No."),
    }
    sample = read(tmp_path, row)
    assert sample.turns[0].parts == ("Of ", 0, " and ", 1, ", which?")
    assert sample.turns[2].parts == ("And this? ", 2)
    assert [image.name for image in sample.images] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("image", [None, "", []])
def test_no_image_is_text_only(tmp_path: Path, image: Any) -> None:
    sample = read(tmp_path, {"image": image, "conversations": talk("Hi", "Hello")})
    assert sample.images == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (17, "17"),
        ("x", "x"),
        (None, "train:0"),
        ("", "train:0"),
        (True, "train:0"),
        ([], "train:0"),
    ],
)
def test_ids(tmp_path: Path, value: Any, expected: str) -> None:
    assert read(tmp_path, {"id": value, "conversations": talk("Hi", "Hello")}).id == expected


def test_answers_before_the_first_question_are_dropped_and_noted(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "Welcome."}, *talk("Hi", "Hello")]
    sample = read(tmp_path, {"conversations": turns})
    assert [turn.text for turn in sample.turns] == ["Hi", "Hello"]
    assert sample.notes == ("leading_answer_dropped",)


def test_a_system_turn_is_kept(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *talk("Hi", "Hello")]
    sample = read(tmp_path, {"conversations": turns})
    assert sample.turns[0] == Turn("system", ("Be brief.",))


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no conversation": ({"id": 1}, "no_conversation"),
    "no list": ({"conversations": "hi"}, "no_conversation"),
    "empty list": ({"conversations": []}, "empty_conversation"),
    "only an answer": ({"conversations": talk("Hi", "Ho")[1:]}, "empty_conversation"),
    "turn is text": ({"conversations": ["hi"]}, "bad_turn"),
    "value missing": ({"conversations": [{"from": "human"}]}, "bad_turn"),
    "value is a number": ({"conversations": [{"from": "human", "value": 3}]}, "bad_turn"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown_role"),
    "role is a list": ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown_role"),
    "two questions": ({"conversations": [*talk("a"), *talk("b", "c")]}, "roles_not_alternating"),
    "late system turn": (
        {"conversations": [*talk("a", "b"), {"from": "system", "value": "x"}]},
        "roles_not_alternating",
    ),
    "empty answer": ({"conversations": talk("a", "")}, "empty_answer"),
    "blank answer": ({"conversations": talk("a", " \n")}, "empty_answer"),
    "no answer": ({"conversations": talk("a", "b", "c")}, "last_turn_unanswered"),
    "image key missing": ({"conversations": talk("<image> a", "b")}, "image_key_missing"),
    "image not in text": ({"image": "a.jpg", "conversations": talk("a", "b")}, "image_not_in_text"),
    "too many marks": (
        {"image": "a.jpg", "conversations": talk("<image>", "b", "<image>", "c")},
        "image_count_mismatch",
    ),
    "too few marks": (
        {"image": ["a.jpg", "b.jpg"], "conversations": talk("<image>", "b")},
        "image_count_mismatch",
    ),
    "image in an answer": (
        {"image": "a.jpg", "conversations": talk("What?", "<image> b")},
        "image_token_in_answer",
    ),
    "image is a number": ({"image": 3, "conversations": talk("<image>", "b")}, "bad_image_name"),
    "image name in a list is null": (
        {"image": [None], "conversations": talk("<image>", "b")},
        "bad_image_name",
    ),
    "zero byte": ({"image": "a\0.jpg", "conversations": talk("<image>", "b")}, "bad_image_name"),
    "absolute": (
        {"image": "/etc/p", "conversations": talk("<image>", "b")},
        "image_outside_folder",
    ),
    "parent": ({"image": "../x", "conversations": talk("<image>", "b")}, "image_outside_folder"),
    "hidden parent": (
        {"image": "a/../../x", "conversations": talk("<image>", "b")},
        "image_outside_folder",
    ),
    "only a folder": (
        {"image": "a/", "conversations": talk("<image>", "b")},
        "image_outside_folder",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_name(tmp_path: Path, case: str) -> None:
    row, reason = BAD_ROWS[case]
    with pytest.raises(RowError) as caught:
        read(tmp_path, row)
    assert caught.value.reason == reason
    assert str(caught.value.where).startswith("train.jsonl:1")
    assert caught.value.fix


def test_a_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        read(tmp_path, [1], name="train.json")
    assert (caught.value.reason, caught.value.where) == ("not_an_object", "train.json row 0")


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    make_images(outside, 1)
    make_images(inside, 1)
    (inside / "link.jpg").symlink_to(outside / "0.jpg")
    (inside / "folder").symlink_to(outside)
    (inside / "own.jpg").symlink_to(inside / "0.jpg")
    for name, good in (("link.jpg", False), ("folder/0.jpg", False), ("own.jpg", True)):
        row = {"image": name, "conversations": talk("<image>", "b")}
        path = write_rows(tmp_path, [row])
        reader = open_source(SourceConfig(path=str(path), images=str(inside)))
        if good:
            assert reader.read(0).images[0].name == name
            continue
        with pytest.raises(RowError) as caught:
            reader.read(0)
        assert caught.value.reason == "image_outside_folder"


def test_source_settings(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"conversations": talk("a", "b")}] * 5)
    reader = open_source(SourceConfig(name="mine", path=str(path), max_rows=2))
    assert (reader.name, len(reader)) == ("mine", 2)
    with pytest.raises(DataError, match="image folder is not there"):
        open_source(SourceConfig(path=str(path), images=str(tmp_path / "no")))


def test_unknown_format_lists_the_known() -> None:
    with pytest.raises(RegistryError, match="llava"):
        FORMATS.get("lava")

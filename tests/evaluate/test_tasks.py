"""Test sets: both forms, and every mistake named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vistune.errors import DataError
from vistune.evaluate.tasks import read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path


def save(folder: Path, *rows: object, name: str = "t.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def good(**changes: object) -> dict[str, object]:
    row = {"id": 1, "image": "images/a.png", "question": "什么颜色？", "answers": ["红色"]}
    return {**row, **changes}


def test_questions(folder: Path) -> None:
    path = save(
        folder,
        good(type="colour", language="zh"),
        "",
        good(id="x", image=None, question="1 + 1?", answers=2, type=None),
        good(id=3, image=["images/a.png", "images/b.png"], choices=["红色", "蓝色"]),
        good(id=4, question="left <image> right"),
    )
    first, text_only, two, marked = read_questions(path)
    assert (first.id, first.text, first.type, first.language) == ("1", "什么颜色？", "colour", "zh")
    assert first.turns[0].parts == (0, "\n什么颜色？")
    assert first.images[0].path == (folder / "images/a.png").resolve()
    assert first.unit == "images/a.png"
    assert text_only.answers == ("2",)
    assert text_only.type == "all"
    assert text_only.unit == "question x"
    assert two.turns[0].parts == (0, "\n", 1, "\n什么颜色？")
    assert two.choices == ("红色", "蓝色")
    assert marked.turns[0].parts == ("left ", 0, " right")
    assert first.where == f"{path}:1"
    assert text_only.where == f"{path}:3"
    assert len(read_questions(path, limit=2)) == 2


def test_json_list_and_own_image_folder(folder: Path) -> None:
    rows = [good(image="a.png"), good(id=2, image="b.png")]
    path = folder / "t.json"
    path.write_text(json.dumps(rows), encoding="utf-8-sig")
    questions = read_questions(path, images=folder / "images")
    assert [q.images[0].name for q in questions] == ["a.png", "b.png"]
    assert questions[1].where == f"{path} row 1"


def test_blind_asks_the_same_words(folder: Path) -> None:
    path = save(
        folder,
        good(),
        good(id=2, question="left <image> right"),
        good(id=3, image=["images/a.png", "images/b.png"]),
        good(id=4, image=None, question="\nkept"),
    )
    one, inside, two, none = (q.blind() for q in read_questions(path))
    assert one.turns[0].parts == ("什么颜色？",)
    assert inside.turns[0].parts == ("left \n right",)
    assert two.turns[0].parts == ("什么颜色？",)
    assert none.turns[0].parts == ("\nkept",)
    assert {q.images for q in (one, inside, two, none)} == {()}
    assert (one.id, one.answers, one.unit) == ("1", ("红色",), "question 1")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("{broken", ":2: not valid JSON"),
        ("[1]", ":2: a row is an object, not list"),
        (good(id=None), ":2: 'id' is missing"),
        (good(id=True), ":2: 'id' is missing"),
        (good(id=1), ":2: the id '1' is already at"),
        (good(id=2, question=" "), ":2: 'question' is missing or empty"),
        (good(id=2, answers=[]), ":2: 'answers' is missing or empty"),
        (good(id=2, answers={"a": 1}), ":2: 'answers' is not text"),
        (good(id=2, choices=["x", "y"]), ":2: no answer is among the choices"),
        (good(id=2, image="images/none.png"), ":2: the image 'images/none.png' does not exist"),
        (good(id=2, image="../secret.png"), ":2: the image '../secret.png' lies outside"),
        (good(id=2, image="/etc/passwd"), ":2: the image '/etc/passwd' lies outside"),
        (good(id=2, question="<image> <image> q"), ":2: the question has 2 <image> marks for 1"),
        (good(id=2, image="broken.png"), ":2: broken.png: "),
        (good(id=2, image=7.5), "the image '7.5' does not exist"),
    ],
)
def test_every_mistake_is_named(folder: Path, row: object, part: str) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    path = save(folder, good(), row)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert part in str(caught.value)
    assert "1 rows of the test set" in str(caught.value)


def test_many_mistakes_are_counted(folder: Path) -> None:
    path = save(folder, *["{"] * 25)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert "25 rows" in str(caught.value)
    assert "and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "has no question"),
        (b"[]", "has no question"),
        (b'[{"id": 1},\n {', "t.json:2:"),
        ("颜色".encode("gbk"), "not UTF-8"),
    ],
)
def test_unusable_files(folder: Path, content: bytes, part: str) -> None:
    path = folder / "t.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert part in str(caught.value)


def test_missing_file(folder: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_questions(folder / "none.jsonl")
    with pytest.raises(DataError, match="directory"):
        read_questions(folder)


def test_llava_rows_are_questions_with_context(folder: Path) -> None:
    def row(number: int, *texts: str) -> dict[str, object]:
        turns = [{"from": ("human", "gpt")[k % 2], "value": t} for k, t in enumerate(texts)]
        return {"id": f"r{number}", "image": "images/a.png", "conversations": turns}

    path = save(folder, row(1, "<image>\na?", "b", "c?", "d"), row(2, "<image>\ne?", "f"))
    first, second = read_questions(path)
    assert [t.speaker for t in first.turns] == ["user", "assistant", "user"]
    assert (first.text, first.answers, first.turns[0].parts) == ("c?", ("d",), (0, "\na?"))
    assert first.blind().turns[0].parts == ("a?",)
    assert (second.id, second.answers) == ("r2", ("f",))
    broken = save(folder, row(1, "<image>\na?", "b"), row(2, "<image>\na?", " "), name="b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        read_questions(broken)

"""Conversions: what fits comes back the same, what does not is counted and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_images, talk, write_rows

from vistune.data.convert import TARGETS, Conversion, convert
from vistune.data.formats import FORMATS, open_source
from vistune.data.formats.captions import CAPTION_QUESTION
from vistune.data.image_file import read_bytes
from vistune.errors import DataError, RegistryError
from vistune.recipe import SourceConfig
from vistune.types import Sample

ROWS = [
    {"id": 7, "image": "a/0.jpg", "conversations": talk("<image>\nWho is it?", "一只猫。")},
    {"id": "x", "conversations": talk("Hi", "Hello", "And?", "Bye")},
    {
        "id": "two",
        "image": ["a/0.jpg", "1.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            *talk("<image> or\n<image>?", "One.", "Sure?", "Yes."),
        ],
    },
]
CAPTION = {
    "id": "9",
    "image": "1.jpg",
    "conversations": talk(f"<image>\n{CAPTION_QUESTION}", 'A dog, "Rex".'),
}
ENDINGS = {"webdataset": "o.tar", "coco_captions": "o.json", "captions_csv": "o.csv"}
FOLDERS = ("image_folder", "cogvlm_sft")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    make_images(made, 2)
    (made / "a").mkdir()
    (made / "0.jpg").rename(made / "a" / "0.jpg")
    return made


def source(folder: Path, rows: list[Any]) -> SourceConfig:
    return SourceConfig(path=str(write_rows(folder, rows)), images=str(folder))


def again(output: Path, to: str, result: Conversion) -> list[Sample]:
    path = output / "labels" if to == "cogvlm_sft" else output
    images = None if result.images is None else str(result.images)
    reader = open_source(SourceConfig(path=str(path), format=to, images=images))  # type: ignore[arg-type]
    return [reader.read(row) for row in range(len(reader))]


def said(samples: list[Sample]) -> list[Any]:
    return [
        (s.id, s.turns, [read_bytes(image) for image in s.images], s.notes)
        for s in sorted(samples, key=lambda s: s.id)
    ]


def originals(config: SourceConfig) -> list[Sample]:
    reader = open_source(config)
    return [reader.read(row) for row in range(len(reader))]


CHATS = ["llava.json", "llava.jsonl", "sharegpt.jsonl", "messages.jsonl", "xtuner.json"]
CHATS += ["alpaca.jsonl", "webdataset.tar"]


@pytest.mark.parametrize(
    "target", [*CHATS, "messages.parquet", "llava.parquet", "sharegpt.parquet"]
)
def test_conversations_come_back_the_same(tmp_path: Path, folder: Path, target: str) -> None:
    if target.endswith("parquet"):
        pytest.importorskip("pyarrow")
    to = target.partition(".")[0]
    config = source(folder, ROWS)
    output = tmp_path / "out" / f"o.{target.partition('.')[2]}"
    result = convert(config, output, to=to)
    assert (result.num_rows, result.num_written, dict(result.losses)) == (3, 3, {})
    assert said(again(output, to, result)) == said(originals(config))
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("to", sorted(TARGETS))
def test_one_caption_fits_everywhere(tmp_path: Path, folder: Path, to: str) -> None:
    config = source(folder, [CAPTION])
    output = tmp_path / ENDINGS.get(to, "o" if to in FOLDERS else "o.jsonl")
    result = convert(config, output, to=to)
    assert dict(result.losses) == {}
    assert said(again(output, to, result)) == said(originals(config))


def test_every_format_can_be_written() -> None:
    assert set(TARGETS) == set(FORMATS)


LOSSES: list[tuple[str, list[Any], dict[str, int]]] = [
    ("visualglm", ROWS, {"row: several_rounds": 2}),
    ("coco_captions", ROWS, {"row: several_rounds": 2, "question": 1}),
    ("coco_captions", [{**CAPTION, "id": "x9"}], {"id": 1}),
    ("coco_captions", [{"id": 1, "conversations": talk("Hi", "Ho")}], {"row: no_image": 1}),
    ("captions_csv", ROWS, {"row: several_rounds": 2}),
    (
        "captions_csv",
        [{"id": 1, "image": ["1.jpg", "1.jpg"], "conversations": talk("<image><image>", "b")}],
        {"row: several_images": 1},
    ),
    (
        "visualglm",
        [{"id": 1, "image": "1.jpg", "conversations": talk("Who?<image>", "b")}],
        {"image_position": 1},
    ),
    (
        "visualglm",
        [
            {
                "id": 1,
                "conversations": [{"from": "system", "value": "S"}, *talk("a", "b")],
            }
        ],
        {"system_prompt": 1},
    ),
    ("data_juicer", [{"id": 1, "conversations": talk(" a", "b ")}], {"blanks": 2}),
    (
        "data_juicer",
        [{"id": 1, "conversations": talk("say [[gpt]]: x", "b")}],
        {"row: mark_in_text": 1},
    ),
    ("image_folder", [{**CAPTION, "id": "a/b"}], {"id": 1}),
    ("image_folder", [CAPTION, CAPTION], {"id": 1}),
    (
        "cogvlm_sft",
        [{"id": "1", "image": "1.jpg", "conversations": talk("a", "b", "<image>\nc", "d")}],
        {"image_position": 1},
    ),
    (
        "llava",
        [{"id": 1, "conversations": talk("a", " ")}, b"{", ROWS[0]],
        {"row: unusable, empty_answer": 1, "row: unusable, broken_json": 1},
    ),
    ("webdataset", [{**CAPTION, "image": "no.jpg"}], {"row: unusable, image_missing": 1}),
]


@pytest.mark.parametrize(("to", "rows", "losses"), LOSSES)
def test_losses_are_counted_exactly_and_refused(
    tmp_path: Path, folder: Path, to: str, rows: list[Any], losses: dict[str, int]
) -> None:
    config = source(folder, rows)
    output = tmp_path / "out" / ENDINGS.get(to, "o" if to in FOLDERS else "o.jsonl")
    if losses:
        with pytest.raises(DataError, match="nothing was written") as caught:
            convert(config, output, to=to)
        for kind, number in losses.items():
            assert f"{number}  {kind}: " in caught.value.what
        assert "--allow-loss" in str(caught.value.fix)
        assert list(output.parent.iterdir()) == []
    result = convert(config, output, to=to, allow_loss=True)
    assert dict(result.losses) == losses
    whole = sum(number for kind, number in losses.items() if kind.startswith("row: "))
    assert result.num_written == len(rows) - whole
    if result.num_written:
        assert len(again(output, to, result)) == result.num_written
    if "image_missing" not in str(losses):  # a dry run reads no image
        dry = convert(config, output, to=to, dry_run=True)
        assert (dict(dry.losses), dry.num_written) == (losses, result.num_written)


def test_images_are_copied_when_asked_and_must_be_when_they_stand_inside(
    tmp_path: Path, folder: Path
) -> None:
    config = source(folder, ROWS)
    kept = convert(config, tmp_path / "kept.jsonl", to="llava")
    assert kept.images == folder
    moved = convert(config, tmp_path / "m.jsonl", to="llava", images_to=tmp_path / "photos")
    assert moved.images == tmp_path / "photos"
    copies = sorted(
        str(p.relative_to(moved.images)) for p in moved.images.rglob("*") if p.is_file()
    )
    assert copies == ["1.jpg", "a/0.jpg"]
    assert said(again(tmp_path / "m.jsonl", "llava", moved)) == said(originals(config))
    convert(config, tmp_path / "t.tar", to="webdataset")
    packed = SourceConfig(path=str(tmp_path / "t.tar"), format="webdataset")
    with pytest.raises(DataError, match="stand inside the source"):
        convert(packed, tmp_path / "u.jsonl", to="messages")
    assert not (tmp_path / "u.jsonl").exists()
    out = convert(packed, tmp_path / "u.jsonl", to="messages", images_to=tmp_path / "unpacked")
    assert said(again(tmp_path / "u.jsonl", "messages", out)) == said(originals(config))


def test_images_of_one_name_and_of_none_are_kept_apart(tmp_path: Path, folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    raw = [(folder / name).read_bytes() for name in ("a/0.jpg", "1.jpg")]
    names = ["x.jpg", "x.jpg", None, "https://h/x.jpg", "../x.jpg"]
    rows = [
        {
            "id": str(k),
            "image": {"bytes": raw[k % 2], "path": name},
            "conversations": talk("<image>", "a"),
        }
        for k, name in enumerate(names)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    config = SourceConfig(path=str(tmp_path / "p.parquet"))
    result = convert(config, tmp_path / "o.jsonl", to="llava", images_to=tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == [
        "2_0.jpg",
        "3_0.jpg",
        "4_0.jpg",
        "x-2.jpg",
        "x.jpg",
    ]
    assert said(again(tmp_path / "o.jsonl", "llava", result)) == said(originals(config))


def test_places_are_checked_before_anything_is_read(tmp_path: Path, folder: Path) -> None:
    config = source(folder, ROWS)
    output = tmp_path / "o.jsonl"
    convert(config, output, to="llava")
    with pytest.raises(DataError, match="there already"):
        convert(config, output, to="llava")
    convert(config, output, to="messages", overwrite=True)
    assert "messages" in json.loads(output.read_text().splitlines()[0])
    assert oct(os.stat(output).st_mode & 0o777) == oct(0o666 & ~_umask())  # noqa: PTH116
    with pytest.raises(DataError, match="there already"):
        convert(config, tmp_path / "in", to="image_folder", overwrite=True)
    with pytest.raises(DataError, match="ending"):
        convert(config, tmp_path / "o.txt", to="llava")
    with pytest.raises(DataError, match="holds the images itself"):
        convert(config, tmp_path / "o.tar", to="webdataset", images_to=tmp_path / "p")
    with pytest.raises(RegistryError, match="did you mean 'llava'"):
        convert(config, tmp_path / "x.jsonl", to="lava")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="not written as Parquet"):
        convert(config, tmp_path / "o.parquet", to="alpaca")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The check sees every row, by headers only, and says why a row cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_encoder, make_images, make_plan, talk, write_rows
from PIL import Image

from vistune.data.check import CheckReport, check_sources
from vistune.data.formats import open_source
from vistune.data.image import ImagePlan
from vistune.errors import DataError
from vistune.recipe import SourceConfig


def rows_of(folder: Path, number: int) -> list[object]:
    names = make_images(folder, number)
    rows: list[object] = []
    for k, name in enumerate(names):
        text = f"A thing number {k}, " * (k % 5 + 1)
        rows.append({"id": k, "image": name, "conversations": talk("<image>\nWhat?", text)})
    return rows


def check(path: Path, **change: object) -> CheckReport:
    options: dict[str, object] = {"max_tokens": 400, "overlong": "drop", **change}
    return check_sources([SourceConfig(path=str(path))], make_encoder(), **options)  # type: ignore[arg-type]


def test_a_clean_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path, rows_of(tmp_path, 6))
    report = check(path)
    assert (report.total_rows, report.num_ok, report.rejected) == (6, 6, [])
    reader, encoder = open_source(SourceConfig(path=str(path))), make_encoder()
    lengths = [encoder.count_tokens(reader.read(row)) for row in range(6)]
    assert report.lengths.tolist() == lengths
    assert report.lengths.dtype == np.int32
    assert (report.num_images, report.num_image_tokens) == (6, 24)
    targets = [
        encoder.encode(reader.read(row), max_tokens=400, overlong="drop") for row in range(6)
    ]
    assert report.num_target_tokens == sum(int(t.target_mask.sum()) for t in targets)


def test_rejects_notes_and_report(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 6)
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").unlink()
    rows[3] = b'{"id": "broken'
    rows.append({"id": 0, "conversations": talk("What ends a text?", "The </s> does.")})
    rows.append({"conversations": [{"from": "gpt", "value": "Hi"}, *talk("a", "b")]})
    rows.append({"id": "long", "conversations": talk("a", "word " * 500)})
    report = check(write_rows(tmp_path, rows))
    assert report.by_reason() == {
        "image_empty": 1,
        "image_missing": 1,
        "broken_json": 1,
        "overlong": 1,
    }
    assert [row.where for row in report.rejected] == [
        "train.jsonl:2",
        "train.jsonl:3",
        "train.jsonl:4",
        "train.jsonl:9",
    ]
    assert [row.id for row in report.rejected] == ["1", "2", None, "long"]
    assert report.accepted[0].tolist() == [0, 4, 5, 6, 7]
    assert report.notes == {
        "duplicate_id": 1,
        "special_token_in_text": 1,
        "leading_answer_dropped": 1,
    }
    assert report.note_rows["duplicate_id"] == ["train.jsonl:7 (id 0)"]
    assert "image_missing: train.jsonl:3" in report.table()
    content = json.loads(json.dumps(report.to_json()))
    assert (content["num_rows"], content["num_ok"], content["num_rejected"]) == (9, 5, 4)
    assert content["tokens_per_row"]["max"] == int(report.lengths.max())
    report.write_quarantine(tmp_path / "q.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == [row.reason for row in report.rejected]
    assert all(line["fix"] for line in lines)


def test_truncation_is_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"conversations": talk("a", "word " * 500)}])
    report = check(path, overlong="truncate_text")
    assert report.lengths.tolist() == [400]
    assert report.notes == {"truncated": 1, "answer_seems_cut_off": 1}


def test_long_rows_are_named_with_exact_counts(tmp_path: Path) -> None:
    names = make_images(tmp_path, 2)
    rows = [{"id": "long", "image": names, "conversations": talk("<image><image>", "word " * 500)}]
    report = check(write_rows(tmp_path, rows))
    encoder = make_encoder()
    reader = open_source(SourceConfig(path=str(tmp_path / "train.jsonl")))
    text = encoder.count_tokens(reader.read(0)) - 8
    assert [(row.id, row.detail) for row in report.rejected] == [
        ("long", f"2 images = 8 + {text:,} text tokens > 400")
    ]
    assert "raise batch.max_tokens or shrink images" in report.rejected[0].fix
    assert f"train.jsonl:1: 2 images = 8 + {text:,} text tokens > 400" in report.table()


def test_turns_are_dropped_whole_with_their_images(tmp_path: Path) -> None:
    names = make_images(tmp_path, 2)
    talks = talk("<image> One?", "One. " * 20, "<image> Two?", "Two. " * 20, "Three?", "Three.")
    rows: list[object] = [
        {"id": "a", "image": names, "conversations": talks},
        {"id": "b", "conversations": talk("Too long?", "Yes. " * 500)},
        {"id": "c", "conversations": talk("Short?", "Yes.")},
    ]
    path = write_rows(tmp_path, rows)
    encoder, reader = make_encoder(), open_source(SourceConfig(path=str(path)))
    sample = reader.read(0)
    two = int(encoder.tokenise_turns(sample.turns[:4], [(30, 40)] * 2).ids.size)
    for limit, kept, images in ((two, 4, 2), (two - 1, 2, 1)):
        report = check(path, overlong="drop_turn", max_tokens=limit)
        encoded = encoder.encode(sample, max_tokens=limit, overlong="drop_turn")
        whole = encoder.tokenise_turns(sample.turns[:kept], [(30, 40)] * 2)
        assert encoded.input_ids.tolist() == whole.ids.tolist()
        assert len(encoded.pixel_values) == images
        assert report.lengths[0] == encoded.input_ids.size
        assert report.image_tokens.tolist() == [4 * images, 0]
        assert report.num_images == images
        assert report.notes["turns_dropped"] == 1
        assert [(row.id, row.reason) for row in report.rejected] == [("b", "overlong")]


def test_images_are_shrunk_only_where_that_saves_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path, rows_of(tmp_path, 2))
    with pytest.raises(DataError, match="every image becomes 4 tokens whatever its size") as caught:
        check(path, overlong="shrink_image")
    assert caught.value.where == "data.overlong"

    class AnySize(ImagePlan):
        """A plan that keeps an image's size, to whole patches."""

        def size_for(self, height: int, width: int) -> tuple[int, int]:
            return max(14, height // 14 * 14), max(14, width // 14 * 14)

        def apply(self, image: Image.Image) -> Any:
            size = self.size_for(image.height, image.width)
            return np.zeros((3, *size), dtype=np.float32)

    plan = AnySize(**{**make_plan().model_dump()})
    encoder = make_encoder(image_plan=plan)
    Image.new("RGB", (280, 280)).save(tmp_path / "0.jpg")
    sample = open_source(SourceConfig(path=str(path))).read(0)
    whole = encoder.count_tokens(sample)
    encoded = encoder.encode(sample, max_tokens=whole - 300, overlong="shrink_image")
    side = encoded.pixel_values[0].shape[1]
    assert encoded.num_image_tokens == (side // 14) ** 2
    assert whole - 340 < encoded.input_ids.size <= whole - 300
    assert encoded.target_mask.sum() == encoder.tokenise(sample).mask.sum()
    source = SourceConfig(path=str(path))
    report = check_sources([source], encoder, max_tokens=whole - 300, overlong="shrink_image")
    assert report.lengths[0] == encoded.input_ids.size
    assert report.notes["images_shrunk"] == 1


def test_deep_finds_what_headers_hide(tmp_path: Path) -> None:
    path = write_rows(tmp_path, rows_of(tmp_path, 2))
    file = tmp_path / "1.jpg"
    content = bytearray(file.read_bytes())
    scan = content.index(b"\xff\xda")
    # A marker no decoder knows in the middle of the picture; header and end are as they were.
    content[scan + 14 : scan + 16] = b"\xff\xc1"
    file.write_bytes(bytes(content))
    assert check(path).num_ok == 2
    assert check(path, deep=True).by_reason() == {"image_corrupt": 1}


def test_sources_called_alike_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b", "b/c", "x/b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        rows: list[Any] = [{"conversations": talk("Hi", "Ho")}, {"conversations": []}]
        paths.append(str(write_rows(tmp_path / name, rows, "train.jsonl")))
    named = [SourceConfig(path=paths[0], name="mine"), SourceConfig(path=paths[1], name="mine")]
    unnamed = [SourceConfig(path=path) for path in paths]
    report = check_sources([*named, *unnamed], make_encoder(), max_tokens=900, overlong="error")
    expected = ("mine", "mine", "a/train", "b/train", "c/train", "b/train#2")
    assert report.sources == expected
    assert tuple(row.source for row in report.rejected) == expected
    assert tuple(reader.read(0).source for reader in report.readers) == expected
    alone = check_sources(unnamed[:1], make_encoder(), max_tokens=900, overlong="error")
    assert alone.sources == ("train",)

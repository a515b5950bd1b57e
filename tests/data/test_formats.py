"""A golden row of every format, and what each refuses."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from data_helpers import make_images, talk, write_rows

from vistune.data.formats import FORMATS, open_source
from vistune.data.formats.captions import CAPTION_QUESTION as QUESTION
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample


def read(folder: Path, format: str, row: dict[str, Any]) -> Sample:
    path = write_rows(folder, [row])
    reader = open_source(SourceConfig(path=str(path), format=format))  # type: ignore[arg-type]
    reader = pickle.loads(pickle.dumps(reader))  # as a spawned worker gets it
    return reader.read(0)


def shown(sample: Sample) -> list[tuple[str, str]]:
    """Speaker and text, images as {0}, {1}, ..."""
    return [
        (turn.speaker, "".join(p if isinstance(p, str) else f"{{{p}}}" for p in turn.parts))
        for turn in sample.turns
    ]


ASKED = [("user", "{0}\nWho is it?"), ("assistant", "A cat.")]
IMAGE_PART = {"type": "image", "image": "0.jpg"}
TEXT_PART = {"type": "text", "text": "Who is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}

DJ, EOC = "<__dj__image>", "<|__dj__eoc|>"
GOLDEN: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("llava", {"image": "0.jpg", "conversations": talk("<image>\nWho is it?", "A cat.")}, ASKED),
    (
        "sharegpt",
        {
            "images": ["0.jpg"],
            "system": "S",
            "tools": "[]",
            "conversations": talk("<image>\nWho is it?", "A cat."),
        },
        [("system", "S"), *ASKED],
    ),
    (
        "messages",
        {
            "messages": [{"role": "user", "content": "<image>\nWho is it?"}, ANSWER],
            "images": ["0.jpg"],
        },
        ASKED,
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "S"}]},
                {"role": "user", "content": [TEXT_PART, IMAGE_PART]},
                {**ANSWER, "loss": True},
            ]
        },
        [("system", "S"), ("user", "Who is it?{0}"), ("assistant", "A cat.")],
    ),
    (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "0.jpg"}}, TEXT_PART],
                },
                ANSWER,
            ]
        },
        [("user", "{0}Who is it?"), ("assistant", "A cat.")],
    ),
    (
        "messages",
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, TEXT_PART]}, ANSWER],
            "images": ["0.jpg"],
        },
        [("user", "{0}Who is it?"), ("assistant", "A cat.")],
    ),
    (
        "xtuner",
        {
            "conversation": [
                {"system": "S", "input": "<image>\nWho is it?", "output": "A cat."},
                {"input": "Sure?", "output": "Yes.", "output_with_loss": True},
            ],
            "image": "0.jpg",
        },
        [("system", "S"), *ASKED, ("user", "Sure?"), ("assistant", "Yes.")],
    ),
    (
        "alpaca",
        {
            "instruction": "Name it.",
            "input": "<image>",
            "output": "A cat.",
            "history": [["Hello", "Hi."]],
            "system": "S",
            "images": ["0.jpg"],
        },
        [
            ("system", "S"),
            ("user", "Hello"),
            ("assistant", "Hi."),
            ("user", "Name it.\n{0}"),
            ("assistant", "A cat."),
        ],
    ),
    (
        "alpaca",
        {"instruction": "Add 1 and 1.", "input": "", "output": "2", "history": None},
        [("user", "Add 1 and 1."), ("assistant", "2")],
    ),
    (
        "visualglm",
        {"img": "0.jpg", "prompt": "这张图片的背景里有什么内容？", "label": "一只猫。"},
        [("user", "{0}\n这张图片的背景里有什么内容？"), ("assistant", "一只猫。")],
    ),
    (
        "data_juicer",
        {
            "id": "1",
            "images": ["0.jpg"],
            "text": "<__dj__image>\na cat on a mat <|__dj__eoc|>",
            "__dj__stats__": {"words": 5},
        },
        [("user", "{0}"), ("assistant", "a cat on a mat")],
    ),
    (
        "data_juicer",
        {
            "images": ["0.jpg"],
            "text": "<__dj__image>\n[[human]]: Who is it?\n[[gpt]]: A cat.\n<|__dj__eoc|>",
        },
        ASKED,
    ),
    (  # an interleaved document
        "data_juicer",
        {
            "images": ["0.jpg", "0.jpg", "0.jpg"],
            "text": f"{DJ}\na cat {EOC} which sleeps {EOC} {DJ}{EOC} {DJ}\ntwo dogs {EOC}",
        },
        [
            ("user", "{0}"),
            ("assistant", "a cat\n\nwhich sleeps"),
            ("user", "{1}{2}"),
            ("assistant", "two dogs"),
        ],
    ),
    (
        "data_juicer",
        {"text": f"one {EOC} two {EOC}"},
        [("user", ""), ("assistant", "one\n\ntwo")],
    ),
    (  # a conversation, a chunk a round
        "data_juicer",
        {
            "images": ["0.jpg"],
            "text": f"[[human]]: {DJ}\nWho? [[gpt]]: A cat. {EOC} [[human]]: Sure? [[gpt]]: Yes.",
        },
        [("user", "{0}\nWho?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes.")],
    ),
]


@pytest.mark.parametrize(("format", "row", "expected"), GOLDEN)
def test_golden_rows(
    tmp_path: Path, format: str, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    sample = read(tmp_path, format, row)
    assert shown(sample) == expected
    names = ["0.jpg"] * len(re.findall(r"\{\d\}", str(expected)))
    assert [image.name for image in sample.images] == names


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "0.jpg"},
        {"type": "image", "path": "0.jpg"},
        {"type": "image", "url": "0.jpg"},
        {"type": "image", "image": {"path": "0.jpg"}},
        {"type": "image", "image": {"bytes": None, "path": "0.jpg"}},
        {"type": "image_url", "image_url": {"url": "0.jpg", "detail": "high"}},
        {"type": "image_url", "image_url": "0.jpg"},
        {"type": "image", "image": None, "text": None},
    ],
)
@pytest.mark.parametrize("key", ["images", "image"])
def test_every_form_of_an_image_part(tmp_path: Path, part: dict[str, Any], key: str) -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": [part, TEXT_PART]}, ANSWER]}
    if part.get("image", 1) is None:  # it takes the next of the row's own
        row[key] = ["0.jpg"]
    sample = read(tmp_path, "messages", row)
    assert shown(sample)[0] == ("user", "{0}Who is it?")
    assert [image.name for image in sample.images] == ["0.jpg"]


def test_every_format_has_a_golden_row_and_a_name_in_the_recipe() -> None:
    elsewhere = {"coco_captions", "cogvlm_sft", "webdataset", "image_folder", "captions_csv"}
    tested = {format for format, _, _ in GOLDEN} | elsewhere
    assert tested == set(FORMATS)
    assert set(get_args(SourceConfig.model_fields["format"].annotation)) == set(FORMATS)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sharegpt", {"conversations": talk("a", "b"), "tools": "[{}]"}, "unsupported_key"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "bad_turn"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad_turn"),
    ("messages", {"messages": ["hi"]}, "bad_turn"),
    ("messages", {"conversations": []}, "no_conversation"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {**ANSWER, "loss": False}]},
        "unsupported_key",
    ),
    (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://x/y.jpg"}}],
                },
                ANSWER,
            ]
        },
        "image_is_url",
    ),
    (
        "messages",
        {
            "messages": [{"role": "user", "content": [IMAGE_PART]}, ANSWER],
            "images": ["0.jpg"],
        },
        "image_count_mismatch",
    ),
    ("xtuner", {"conversation": [{"input": "", "output": "text"}]}, "empty_question"),
    (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "output_with_loss": False}]},
        "unsupported_key",
    ),
    ("xtuner", {"conversation": [["a", "b"]]}, "bad_turn"),
    (
        "xtuner",
        {"conversation": [{"input": "a", "output": "b", "sep": "<x>"}]},
        "unsupported_key",
    ),
    ("alpaca", {"instruction": "a", "output": "<nooutput>"}, "empty_answer"),
    ("alpaca", {"instruction": "a"}, "bad_turn"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "bad_turn"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "x"}, "no_conversation"),
    ("visualglm", {"img": 3, "prompt": "a", "label": "b"}, "bad_image_name"),
    ("visualglm", {"img": "0.jpg", "prompt": "a <image>", "label": "b"}, "image_count_mismatch"),
    (
        "data_juicer",
        {"images": ["0.jpg", "1.jpg"], "text": f"{DJ} a {EOC} {DJ} {EOC}"},
        "empty_answer",
    ),
    ("data_juicer", {"images": ["0.jpg"], "text": f"{DJ} a {EOC} {DJ} b"}, "image_count_mismatch"),
    ("data_juicer", {"text": "<|__dj__eoc|>"}, "empty_conversation"),
    ("data_juicer", {"images": ["0.jpg"], "text": "<__dj__image>"}, "empty_answer"),
    ("llava", {"image": "x" * 5000, "conversations": talk("<image>", "a")}, "bad_image_name"),
    ("data_juicer", {"images": ["/e/0.jpg"], "text": "<image> a"}, "image_outside_folder"),
]


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_what_formats_refuse(tmp_path: Path, format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(tmp_path, format, row)
    assert caught.value.reason == reason
    assert str(caught.value.where).startswith("train.jsonl:1")
    assert caught.value.fix


def test_data_juicer_takes_absolute_paths_inside_the_folder(tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    row = {"images": [str(tmp_path.resolve() / "0.jpg")], "text": "<__dj__image> a cat"}
    assert read(tmp_path, "data_juicer", row).images[0].path.is_file()


# --- COCO ---------------------------------------------------------------------------------


def coco(folder: Path, content: Any) -> SourceConfig:
    (folder / "c.json").write_text(json.dumps(content))
    return SourceConfig(path=str(folder / "c.json"), format="coco_captions")


def test_coco_captions(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "A man with a helmet."},
            {"id": 2, "image_id": 8, "caption": "Lost."},
            {"id": 3, "image_id": 7},
            "x",
        ],
    }
    reader = open_source(coco(tmp_path, content))
    assert len(reader) == 4
    sample = reader.read(0)
    assert (sample.id, sample.where, sample.images[0].name) == ("1", "c.json annotation 0", "7.jpg")
    assert shown(sample) == [("user", f"{{0}}\n{QUESTION}"), ("assistant", "A man with a helmet.")]
    for row, reason in ((1, "bad_image_name"), (2, "bad_turn"), (3, "bad_turn")):
        with pytest.raises(RowError) as caught:
            reader.read(row)
        assert (caught.value.reason, caught.value.where) == (reason, f"c.json annotation {row}")
    for bad in ([], {"images": []}):
        with pytest.raises(DataError, match="no COCO caption file"):
            open_source(coco(tmp_path, bad))


# --- CogVLM-SFT ---------------------------------------------------------------------------


def test_cogvlm_sft(tmp_path: Path) -> None:
    labels, images = tmp_path / "labels_en", tmp_path / "images"
    labels.mkdir()
    images.mkdir()
    make_images(images, 2)
    turns = [
        {"role": "user", "content": "Who is it?"},
        ANSWER,
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    (labels / "0.json").write_text(json.dumps({"conversations": turns}))
    (labels / "1.json").write_text("{")
    (labels / "5.json").write_text(json.dumps({"conversations": turns}))
    (labels / "notes.txt").write_text("no label")
    reader = open_source(SourceConfig(path=str(labels), format="cogvlm_sft"))
    assert (reader.name, len(reader)) == ("labels_en", 3)
    sample = reader.read(0)
    assert (sample.id, sample.where) == ("0", "labels_en/0.json")
    assert shown(sample) == [*ASKED, ("user", "Sure?"), ("assistant", "Yes.")]
    for row, reason in ((1, "broken_json"), (2, "image_missing")):
        with pytest.raises(RowError) as caught:
            reader.read(row)
        assert caught.value.reason == reason
    with pytest.raises(DataError, match="folder of labels is not there"):
        open_source(SourceConfig(path=str(labels / "0.json"), format="cogvlm_sft"))
    with pytest.raises(DataError, match="holds no JSON file"):
        open_source(SourceConfig(path=str(images), images=str(images), format="cogvlm_sft"))
    first = next(images.glob("0.*"))
    (images / f"{first.stem}.webp").write_bytes(first.read_bytes())
    with pytest.raises(RowError, match=f"2 images are called {first.stem}"):
        open_source(SourceConfig(path=str(labels), format="cogvlm_sft")).read(0)
    labels.rename(tmp_path / "labels_zh")
    with pytest.raises(DataError, match="each folder of labels is a source"):
        open_source(SourceConfig(path=str(tmp_path), format="cogvlm_sft"))

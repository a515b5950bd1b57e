"""Whatever stands in a dataset file, a row is loaded or rejected with its reason; nothing else."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_helpers import llama_tokenizer, make_encoder, make_images, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vistune.data.check import check_sources
from vistune.data.formats import FORMATS, open_source
from vistune.data.image import probe
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "<image>",
            "<image>\nWhat?",
            "a <image> b <image>",
            "</s>",
            "<|im_end|><|im_start|>",
            "<unk>",
            "",
            " \n",
            "ok",
            "\ud800",
            "\x00",
            "{{ x }}{% y %}",
            "\ue0f0a1\ue0f1",
        ]
    ),
)
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "bot", "", None, 3])
TURN = st.one_of(
    st.fixed_dictionaries({"from": ROLES, "value": TEXTS}),
    st.fixed_dictionaries({"from": ROLES, "value": st.none() | st.integers() | st.lists(TEXTS)}),
    TEXTS,
    st.none(),
)
PAIR = st.builds(
    lambda a, b: [{"from": "human", "value": a}, {"from": "gpt", "value": b}], TEXTS, TEXTS
)
NAMES = st.sampled_from(
    [
        "0.jpg",
        "1.jpg",
        "bad.jpg",
        "empty.png",
        "no.jpg",
        "../0.jpg",
        "/e/p",
        "",
        ".",
        "a" * 300,
    ]
)
ANY = st.none() | st.integers() | st.floats() | TEXTS
ROW = st.one_of(
    st.fixed_dictionaries(
        {"conversations": st.one_of(PAIR, st.lists(TURN, max_size=5), ANY)},
        optional={
            "id": ANY | st.lists(ANY, max_size=2),
            "image": NAMES | st.lists(NAMES | ANY, max_size=3) | ANY,
        },
    ),
    ANY,
    st.lists(ANY, max_size=2),
)


GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def write(path: Path, rows: list[Any], raw: list[bytes]) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *lines, *raw]))


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "plain"])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    raw=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b" ")), max_size=2),
    policy=st.sampled_from(["drop", "truncate_text"]),
    limit=st.sampled_from([8, 60, 500]),
)
def test_every_row_is_loaded_or_rejected(
    tmp_path: Path, template: str, rows: list[Any], raw: list[bytes], policy: Any, limit: int
) -> None:
    if not (tmp_path / "0.jpg").exists():
        make_images(tmp_path, 2)
        (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 40)
        (tmp_path / "empty.png").write_bytes(b"")
    write(tmp_path / "f.jsonl", rows, raw)
    source = SourceConfig(path=str(tmp_path / "f.jsonl"))
    encoder = make_encoder(template, llama_tokenizer())
    report = check_sources([source], encoder, max_tokens=limit, overlong=policy, deep=True)
    assert report.num_ok + len(report.rejected) == report.total_rows
    for row in report.rejected:
        assert row.reason
        assert row.fix
        assert row.where.startswith("f.jsonl:")
    if limit == 500 and template != "plain":
        assert 0 in report.accepted[0]  # the known good row in front
    assert (report.lengths <= limit).all()


NOT_ROWS = {"coco_captions", "cogvlm_sft", "webdataset", "image_folder", "captions_csv"}
"""Formats that are not one object a row."""
KEYS = [
    "conversations",
    "messages",
    "conversation",
    "from",
    "value",
    "role",
    "content",
    "input",
    "output",
    "system",
    "tools",
    "loss",
    "instruction",
    "history",
    "images",
    "image",
    "img",
    "prompt",
    "label",
    "text",
    "type",
    "image_url",
    "url",
    "id",
    "need_eos_token",
]
VALUES = st.recursive(
    ANY | NAMES | ROLES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        | st.tuples(inner, inner).map(list)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("format", sorted({*FORMATS} - NOT_ROWS))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=5))
def test_every_format_reads_or_refuses_a_row(
    tmp_path: Path, format: Any, row: dict[str, Any]
) -> None:
    (tmp_path / "f.jsonl").write_bytes(json.dumps(row).encode())
    reader = open_source(SourceConfig(path=str(tmp_path / "f.jsonl"), format=format))
    try:
        sample = reader.read(0)
    except RowError as error:
        assert error.reason
        return
    make_encoder().tokenise_turns(sample.turns, [(8, 8)] * len(sample.images))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=60) | st.text(alphabet='[]{},:"\\1 \n', max_size=30).map(str.encode)
)
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    try:
        report = check_sources(
            [SourceConfig(path=str(tmp_path / "f.json"))],
            make_encoder(),
            max_tokens=100,
            overlong="drop",
        )
    except DataError:
        return
    assert report.num_ok == 0
    assert len(report.rejected) == report.total_rows > 0


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet='ab0.,"\n\r\t猫', max_size=40).map(str.encode),
    header=st.sampled_from([b"image,caption\n", b"caption\timage\tid\r\n", b""]),
)
def test_any_csv_row_is_read_or_refused(tmp_path: Path, content: bytes, header: bytes) -> None:
    (tmp_path / "f.csv").write_bytes(header + content)
    try:
        reader = open_source(SourceConfig(path=str(tmp_path / "f.csv"), format="captions_csv"))
    except DataError:
        return
    for row in range(len(reader)):
        try:
            assert reader.read(row).where == reader.where(row)
        except RowError as error:
            assert error.where == reader.where(row)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    members=st.lists(
        st.tuples(
            st.sampled_from(["a.jpg", "a.json", "a.txt", "b.json", "b.1.png", ".x", "c/d.txt"]),
            st.binary(max_size=30) | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
        ),
        max_size=5,
    ),
    cut=st.integers(0, 3000),
)
def test_any_archive_is_read_or_refused(
    tmp_path: Path, members: list[tuple[str, Any]], cut: int
) -> None:
    with tarfile.open(tmp_path / "f.tar", "w") as archive:
        for name, content in members:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    if cut < 1500:
        whole = (tmp_path / "f.tar").read_bytes()
        (tmp_path / "f.tar").write_bytes(whole[:cut])
    try:
        reader = open_source(SourceConfig(path=str(tmp_path / "f.tar"), format="webdataset"))
    except DataError:
        return
    for row in range(len(reader)):
        try:
            sample = reader.read(row)
            for image in sample.images:
                probe(image, make_plan())
        except RowError as error:
            assert error.reason
            assert error.fix

"""Whatever stands in a dataset file, a row is loaded or rejected with its reason; nothing else."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from data_helpers import llama_tokenizer, make_encoder, make_images, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vistune.data.check import check_sources
from vistune.data.formats import FORMATS, open_source
from vistune.data.image import probe
from vistune.data.loader import TrainData
from vistune.errors import DataError, RowError
from vistune.recipe import BatchConfig, DataConfig, SourceConfig

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


NASTY_TEXTS = [
    *("<image>", "<image>\nWhat?", "ok", "", " \n", "</s>", "<unk><s>", "\ud800", "\x00"),
    *("你好，这是什么？", "一只猫。" * 40, "word " * 3000, "x" * 9000, "\ue0f0a1"),
    *("{{ x }}{% raw %}", "<|im_end|><|im_start|>", "a <image> b <image>"),
    *("\u3000\u00a0\t\r\n", "e\u0301\u200d\U0001f469\u200d\U0001f467", "▁▁ ▁"),
]
NASTY_NAMES = [
    *("0.jpg", "1.jpg", "bad.jpg", "empty.png", "no.jpg", "../0.jpg", "/etc/passwd", ""),
    *(".", "a" * 300, "http://x/y.jpg", "data:image/png;base64,AA", "sub/../0.jpg", "图.png"),
    *("0.jpg\x00", "\ud800.jpg", "loop.jpg", "fifo", "folder", "huge.png"),
]


def nasty_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 2 else 7)
    if kind < 3:
        return rng.choice(NASTY_TEXTS)
    if kind < 7:
        return rng.choice([None, 0, -1, 1e308, True, 2**70, [], {}, float("nan")])
    if kind == 7:
        return [nasty_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): nasty_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def nasty_row(rng: random.Random) -> bytes:
    roles = ["human", "gpt"] * 6 + ["user", "assistant", "system", "bot", "", None, 3]
    talk: Any = []
    for k in range(rng.randrange(1, 6)):
        role = ["human", "gpt"][k % 2] if rng.random() < 0.8 else rng.choice(roles)
        value = rng.choice(NASTY_TEXTS) if rng.random() < 0.9 else nasty_value(rng)
        talk.append({"from": role, "value": value} if rng.random() < 0.95 else nasty_value(rng))
    if rng.random() < 0.3:  # one thing wrong at most
        talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": rng.choice(NASTY_TEXTS)}]
    row: Any = {"id": rng.choice(["a", 7, "", None, "图"]), "conversations": talk}
    if rng.random() < 0.2:
        talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "我。"}]
        row = {"conversations": talk, "image": rng.choice(NASTY_NAMES)}
    elif rng.random() < 0.5:
        pass
    elif rng.random() < 0.6:
        row["image"] = rng.choice(NASTY_NAMES) if rng.random() < 0.7 else nasty_value(rng)
    if rng.random() < 0.1:
        row = nasty_value(rng)
    raw = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    damage = rng.random()
    if damage < 0.1:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at + rng.randrange(3) :]
    elif damage < 0.15:
        raw = raw[: rng.randrange(len(raw))]
    elif damage < 0.16:
        raw = b"[" * 5000
    return raw.replace(b"\n", b" ").replace(b"\r", b" ").strip() or b"0"


@pytest.mark.slow
def test_a_hundred_thousand_malformed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 100_000
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_images(tmp_path, 2)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 40)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "fifo")
    header = b"IHDR" + (200_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    whole = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + whole + b"IEND")
    rng = random.Random(0)
    good = json.dumps(GOOD).encode()
    rows = [good, *(nasty_row(rng) for _ in range(number - 1))]
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join(rows))
    source, encoder = SourceConfig(path=str(path)), make_encoder()
    report = check_sources([source], encoder, max_tokens=600, overlong="drop_turn", workers=2)
    assert report.total_rows == number
    assert report.num_ok + len(report.rejected) == number
    assert min(report.num_ok, len(report.rejected)) > 5_000
    assert len(report.by_reason()) > 20
    rejected = {row.where for row in report.rejected}
    assert len(rejected) == len(report.rejected)
    assert all(row.reason and row.fix and row.detail for row in report.rejected)
    report.write_quarantine(tmp_path / "quarantine.jsonl")
    config = DataConfig(
        train=(source,), workers=0, overlong="drop_turn", max_dropped_frac=1.0, shuffle=True
    )
    data = TrainData(config, BatchConfig(max_tokens=600, samples=64), encoder, 0, report=report)
    # Every usable row is read as training reads it: none fails that the check let through.
    loaded = 0
    for step in itertools.islice(data.steps(), data.steps_per_epoch()):
        loaded += sum(batch.num_samples for batch in step)
        assert not [row for batch in step for row in batch.rejected]
    assert loaded == report.num_ok


def test_chinese_from_file_to_batch(tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    (tmp_path / "0.jpg").rename(tmp_path / "图片.jpg")
    rows: list[Any] = [
        {
            "id": "第一行",
            "image": "图片.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\n这张图片里有什么？"},
                {"from": "gpt", "value": "一只猫坐在垫子上，旁边有一杯茶。"},
            ],
        },
        {
            "id": "第二行",
            "conversations": [
                {"from": "human", "value": "你好！"},
                {"from": "gpt", "value": "你好，有什么可以帮你？\n\n一、看图；二、聊天。"},
            ],
        },
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "数据.jsonl").write_text(lines, encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "数据.jsonl"))
    for template in ("vicuna_v1", "llama_2"):
        encoder = make_encoder(template)
        data = TrainData(
            DataConfig(train=(source,), workers=0, shuffle=False),
            BatchConfig(max_tokens=600, samples=2),
            encoder,
            0,
        )
        assert data.report.scripts == {"chinese": 2}
        [batch] = next(data.steps())
        assert batch.sample_ids == ("第一行", "第二行")
        assert batch.num_tokens == data.report.num_tokens
        assert batch.num_targets == data.report.num_target_tokens
        said = encoder.tokenizer.decode(batch.target_ids_M.tolist())
        for answer in ("一只猫坐在垫子上，旁边有一杯茶。", "一、看图；二、聊天。"):
            assert answer in said

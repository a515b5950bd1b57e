"""How a dataset is written is found from what it holds; what could be two things is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_helpers import talk, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vistune.data.detect import Detected, detect
from vistune.data.formats import open_source
from vistune.data.formats.paths import files_of
from vistune.data.index.key import source_key
from vistune.errors import DataError, MissingExtraError
from vistune.recipe import SourceConfig

LLAVA = {"conversations": talk("Hi", "Ho")}


def shard(path: Path, number: int = 2) -> Path:
    with tarfile.open(path, "w") as archive:
        for k in range(number):
            image = io.BytesIO()
            Image.new("RGB", (8, 8)).save(image, "png")
            for ending, content in (("png", image.getvalue()), ("txt", b"A cat.")):
                info = tarfile.TarInfo(f"{path.stem}-{k}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def label(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}]
    path.write_text(json.dumps({"conversations": turns}))


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([LLAVA], "llava"),
        ([LLAVA, b"{broken", [], {"image": "a.jpg", **LLAVA}], "llava"),
        ([LLAVA, {"images": [], **LLAVA}], "sharegpt"),
        ([{"system": "Be brief.", **LLAVA}], "sharegpt"),
        ([{"text": "a caption", "images": ["a.jpg"]}], "data_juicer"),
        ([{"prompt": "?", "label": "!"}], "visualglm"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
def test_rows(tmp_path: Path, rows: list[Any], format: str, name: str) -> None:
    if b"{broken" in rows and name == "rows.json":
        rows = [row for row in rows if row != b"{broken"]  # a broken list is broken as a whole
    path = str(write_rows(tmp_path, rows, name))
    assert detect(path) == Detected(format, path)


def test_coco_however_it_is_laid_out(tmp_path: Path) -> None:
    content = {
        "info": {"x": "y" * 100},
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": "A cat."}],
    }
    for indent in (None, 2):
        (tmp_path / "c.json").write_text(json.dumps(content, indent=indent))
        assert detect(str(tmp_path / "c.json")).format == "coco_captions"


def test_tables_and_archives(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('\ufefffile_name,text\na.jpg,"A cat, asleep."\n', "utf-8")
    (tmp_path / "c.tsv").write_text("image\tcaption\na.jpg\tA cat.\n")
    assert detect(str(tmp_path / "c.csv")).format == "captions_csv"
    assert detect(str(tmp_path / "c.tsv")).format == "captions_csv"
    assert detect(str(shard(tmp_path / "s.tar"))).format == "webdataset"
    (tmp_path / "s.tar.gz").write_bytes(b"\x1f\x8b" + b"x" * 100)
    found = detect(str(tmp_path / "s.tar.gz"))
    with pytest.raises(DataError, match="no plain tar"):  # and says what to do
        open_source(SourceConfig(path=found.path, format="webdataset"))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "images": [{"bytes": b"x"}]}]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / "a.parquet")
    assert detect(str(tmp_path / "d" / "a.parquet")).format == "messages"
    assert detect(str(tmp_path / "d")) == Detected("messages", str(tmp_path / "d"))


def test_folders(tmp_path: Path) -> None:
    picture(tmp_path / "plain" / "cats" / "1.png")
    assert detect(str(tmp_path / "plain")).format == "image_folder"
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "a.tar")
    assert detect(str(tmp_path / "shards")).format == "webdataset"
    picture(tmp_path / "sft" / "images" / "1.png")
    label(tmp_path / "sft" / "labels_en" / "1.json")
    labels = Detected("cogvlm_sft", str(tmp_path / "sft" / "labels_en"))
    assert detect(str(tmp_path / "sft")) == detect(labels.path) == labels
    picture(tmp_path / "listed" / "1.png")
    rows = write_rows(tmp_path / "listed", [{"image": "1.png", **LLAVA}])
    assert detect(str(tmp_path / "listed")) == Detected("llava", str(rows))


def test_what_could_be_several_is_refused_with_all_of_them(tmp_path: Path) -> None:
    picture(tmp_path / "sft" / "images" / "1.png")
    for language in ("labels_en", "labels_zh"):
        label(tmp_path / "sft" / language / "1.json")
    write_rows(tmp_path, [{"messages": [], **LLAVA}], "both.jsonl")
    write_rows(tmp_path, [LLAVA, {"messages": []}], "mixed.jsonl")
    (tmp_path / "two").mkdir()
    for name in ("a.json", "b.json"):
        write_rows(tmp_path / "two", [LLAVA], name)
    picture(tmp_path / "also" / "1.png")
    (tmp_path / "also" / "1.txt").write_text("A cat.")
    write_rows(tmp_path / "also", [LLAVA])
    for name, words in (
        ("sft", ("labels_en", "labels_zh")),
        ("both.jsonl", ("llava", "messages")),
        ("two", ("a.json", "b.json")),
        ("also", ("image_folder", "llava")),
    ):
        with pytest.raises(DataError, match="could be several") as caught:
            detect(str(tmp_path / name))
        assert all(word in str(caught.value.got) for word in words)
        assert "--format" in str(caught.value.fix)
    with pytest.raises(DataError, match="in different ways"):
        detect(str(tmp_path / "mixed.jsonl"))


def test_what_is_nothing_is_said_with_what_was_seen(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello world")
    (tmp_path / "empty").mkdir()
    (tmp_path / "void.json").write_bytes(b"")
    write_rows(tmp_path, [{"question": "?", "reply": "!"}], "odd.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name, what, got in (
        ("notes.txt", "no dataset", "hello world"),
        ("empty", "no dataset", "nothing in it"),
        ("odd.jsonl", "no dataset", "question, reply"),
        ("void.json", "empty", ""),
        ("gone", "nothing is there", ""),
        ("*.tar", "no file", ""),
        ("pipe", "pipe", ""),
    ):
        with pytest.raises(DataError, match=what) as caught:
            detect(str(tmp_path / name))
        assert got in str(caught.value.got)


def test_patterns_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in (8, 9, 10):
        shard(tmp_path / f"s-{k:03d}.tar", number=1)
    monkeypatch.chdir(tmp_path)
    names = ["s-008.tar", "s-009.tar", "s-010.tar"]
    for pattern in ("s-*.tar", "s-{008..010}.tar", "s-{008,009,010}.tar", "s-0{08..10}.tar"):
        assert [str(path) for path in files_of(pattern)] == names
        assert detect(pattern) == Detected("webdataset", pattern)
        reader = open_source(SourceConfig(path=pattern, format="webdataset"))
        assert [reader.read(k).id for k in range(3)] == ["s-008-0", "s-009-0", "s-010-0"]
    assert [str(path) for path in files_of("x{8..10}")] == ["x8", "x9", "x10"]
    with pytest.raises(DataError, match="no tar file") as caught:
        open_source(SourceConfig(path="s-{008..011}.tar", format="webdataset"))
    assert "s-011.tar" in str(caught.value.where)
    (tmp_path / "s-{1}.tar").write_bytes((tmp_path / "s-008.tar").read_bytes())
    assert files_of("s-{1}.tar") == [Path("s-{1}.tar")]  # a file that is really called so


def test_an_index_of_shards_knows_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_helpers import make_encoder

    monkeypatch.chdir(tmp_path)
    for k in range(2):
        shard(tmp_path / f"s-{k}.tar")
    source, encoder = SourceConfig(path="s-*.tar", format="webdataset"), make_encoder()
    before = source_key(source, encoder, deep=False)
    assert source_key(source, encoder, deep=False) == before
    shard(tmp_path / "s-2.tar")
    assert source_key(source, encoder, deep=False) != before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "messages", "images", "text", "from", "role", "prompt", "label"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.one_of(
        st.binary(max_size=600),
        st.lists(JSON, max_size=4).map(lambda rows: json.dumps(rows).encode()),
        JSON.map(lambda row: json.dumps(row).encode() + b"\n"),
        st.binary(min_size=1, max_size=40).map(lambda tail: b"PAR1" + tail),
        st.binary(max_size=300).map(lambda head: head.ljust(257, b"\0") + b"ustar" + b"\0" * 300),
    )
)
def test_any_content_is_found_out_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    try:
        found = detect(str(path))
    except (DataError, MissingExtraError) as error:
        assert str(error)
    else:
        assert found.path == str(path)


def test_a_stray_carriage_return_is_refused_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(b"image,caption\rcat.jpg,A cat.\r")
    with pytest.raises(DataError):
        detect(str(path))

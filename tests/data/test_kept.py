"""The cache bounds itself and never loses what a process has open."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_encoder, make_images, talk, write_rows

from vistune.cli.app import main
from vistune.data.cache import cache_folder
from vistune.data.formats import open_source, rows
from vistune.data.index import index_source
from vistune.data.index import open as opening
from vistune.data.kept import Hold, kept, tidy
from vistune.recipe import SourceConfig

DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vistune"


def old(path: Path, days: float) -> Path:
    then_s = time.time() - days * DAY_S
    os.utime(path, (then_s, then_s))
    return path


def entry(kind: str, name: str, *, days: float, size: int = 1000) -> Path:
    path = cache_folder(kind) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    return old(path, days)


def names() -> set[str]:
    return {one.path.name for one in kept()}


def test_what_was_unused_for_long_goes(cache: Path) -> None:
    for kind, name in (("rows", "r"), ("plans", "p.npz"), ("images", "ab/abc")):
        entry(kind, f"{name}-old", days=31)
        entry(kind, f"{name}-new", days=29)
    removed = tidy()
    assert {one.path.name for one in removed} == {"r-old", "p.npz-old", "abc-old"}
    assert names() == {"r-new", "p.npz-new", "abc-new"}


def test_the_longest_unused_goes_where_there_is_too_much(cache: Path) -> None:
    for days in (0, 2, 3, 4):
        entry("rows", f"r{days}", days=days)
    assert {one.path.name for one in tidy(max_bytes=2500)} == {"r4", "r3"}
    assert tidy(max_bytes=0)[0].path.name == "r2"
    assert names() == {"r0"}  # used today, however much there is


def _hold(path: Path, ready: Any, done: Any) -> None:
    hold = Hold(path)
    old(path, 90)
    ready.set()
    done.wait()
    del hold


def test_what_another_process_holds_stays(cache: Path) -> None:
    path = entry("rows", "r", days=90)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, done))
    process.start()
    ready.wait(10)
    (one,) = kept()
    assert one.is_held() and not one.remove()
    assert tidy(max_bytes=0) == [] and path.is_file()
    done.set()
    process.join()
    assert [gone.path for gone in tidy()] == [path]


def test_readers_hold_what_they_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    monkeypatch.setattr(opening, "_ROWS_WORTH_KEEPING", 1)
    monkeypatch.setattr(rows, "_BYTES_WORTH_KEEPING", 1)
    folder = tmp_path / "d"
    folder.mkdir()
    image = make_images(folder, 1)[0]
    said = [{"image": image, "conversations": talk("<image>", "A cat.")}] * 5
    pq.write_table(pa.Table.from_pylist(said), folder / "a.parquet")
    sources = [str(folder / "a.parquet"), str(write_rows(folder, said))]
    opened = []
    for path in sources:
        for _ in range(2):  # made, then found
            reader = open_source(SourceConfig(path=path))
            index = index_source(SourceConfig(path=path), reader, make_encoder())
        opened.append((reader, index))
    held = kept(("rows", "index"))
    assert len(held) == 4 and all(one.is_held() for one in held)
    assert not any(one.remove() for one in held)
    again = pickle.loads(pickle.dumps(opened))  # to a worker, which cannot take the locks along
    assert [reader.read(4).id for reader, _ in again] == ["a:4", "train:4"]
    del opened, reader, index, again
    assert all(one.remove() for one in held) and kept() == []


def test_an_index_that_is_being_removed_is_made_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_ROWS_WORTH_KEEPING", 1)
    source = SourceConfig(path=str(write_rows(tmp_path, [{"conversations": talk("a", "b")}])))
    reader = open_source(source)
    folder = index_source(source, reader, make_encoder()).folder
    (one,) = kept(("index",))
    assert one.remove() and folder is not None and not folder.exists()
    assert index_source(source, reader, make_encoder()).folder == folder
    unfinished = folder.with_name("other.parts")
    unfinished.mkdir()
    (unfinished / "claim-0").touch()
    assert tidy(max_age_s=0) == []  # somebody may be at work
    for path in (unfinished / "claim-0", unfinished):
        old(path, 31)
    assert [gone.path for gone in tidy()] == [unfinished]


def test_an_index_made_afresh_leaves_the_old_one_to_who_has_it_open(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_ROWS_WORTH_KEEPING", 1)
    source = SourceConfig(path=str(write_rows(tmp_path, [{"conversations": talk("a", "b")}] * 9)))
    reader, encoder = open_source(source), make_encoder()
    running = index_source(source, reader, encoder)
    again = index_source(source, reader, encoder, fresh=True)
    (trash,) = (one for one in kept(("index",)) if one.path != again.folder)
    assert trash.is_held() and tidy() == []
    assert running.columns.text_tokens.tolist() == again.columns.text_tokens.tolist()
    del running
    assert [gone.path for gone in tidy()] == [trash.path]
    assert [one.path for one in kept(("index",))] == [again.folder]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["vistune", "data", "cache", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry("rows", "r", days=3, size=1 << 20)
    entry("plans", "p", days=1)
    call(monkeypatch)
    assert "rows\t1\t0\t1.0\t3.0" in capsys.readouterr().out
    call(monkeypatch, "--older-than", "2", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["removed"], facts["freed_mib"]) == (1, 1.0)
    assert [one["number"] for one in facts["kinds"]] == [0, 0, 1, 0]
    hold = Hold(cache_folder("plans") / "p")
    call(monkeypatch, "--clear")
    assert names() == {"p"}
    del hold
    call(monkeypatch, "--clear")
    assert "1 removed" in capsys.readouterr().out and names() == set()

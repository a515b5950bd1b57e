"""An index says what reading every row says, is built once by many, and goes on after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_encoder, make_images, make_plan, talk, write_rows
from PIL import Image

from vistune.data.cache import file_mark
from vistune.data.check import check_sources
from vistune.data.formats import open_source
from vistune.data.index import RowColumns, RowScan, SourceIndex, index_source
from vistune.data.index import build as building
from vistune.data.index import open as opening
from vistune.data.index.build import Build
from vistune.data.index.key import source_key
from vistune.data.index.scan import look_of
from vistune.errors import DataError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "_ROWS_WORTH_KEEPING", 1)
    monkeypatch.setattr(opening, "_UNIT_ROWS", 4)
    return tmp_path / "cache" / "vistune" / "index"


def source_of(folder: Path, number: int = 18, *, name: str = "train.jsonl") -> SourceConfig:
    folder.mkdir(exist_ok=True)
    rows: list[Any] = []
    for k, image in enumerate(make_images(folder, number)):
        rows.append({"id": k, "image": image, "conversations": talk("<image>\nWhat?", "It. " * k)})
    rows[5] = {"id": 5, "conversations": talk("Hi", "It says </s>.")}
    rows[7] = b'{"broken'
    rows[9]["image"] = "gone.jpg"
    return SourceConfig(path=str(write_rows(folder, rows, name)))


def build(source: SourceConfig, **change: Any) -> SourceIndex:
    return index_source(source, open_source(source), make_encoder(), **change)


def same(a: SourceIndex, b: SourceIndex) -> bool:
    names = RowColumns.names()
    equal = all(np.array_equal(a.columns.array(n), b.columns.array(n)) for n in names)
    return equal and (a.rejected, a.note_names) == (b.rejected, b.note_names)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_is_what_was_scanned(tmp_path: Path, cache: Path, workers: int) -> None:
    source = source_of(tmp_path / "d")
    reader, encoder = open_source(source), make_encoder()
    plain = RowScan(reader, encoder).rows(range(len(reader)))
    seen: list[tuple[int, int]] = []
    made = build(source, workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert same(made, plain)
    assert seen[-1] == (18, 18)
    assert [path.name for path in cache.iterdir()] == [made.folder and made.folder.name]
    for row in (1, 5, 17):
        tokens = encoder.tokenise(reader.read(row))
        assert made.columns.text_tokens[row] == tokens.ids.size - tokens.num_image_tokens
        assert made.columns.image_tokens[row] == tokens.num_image_tokens
        assert made.columns.target_tokens[row] == tokens.mask[1:].sum()
    assert sorted(made.rejected) == [0, 7, 9]  # an empty answer, broken JSON, a missing image
    assert made.noted("special_token_in_text").nonzero()[0].tolist() == [5]
    assert made.columns.image_size.tolist() == [[30, 40]] * 14
    assert np.diff(made.columns.first_image).tolist() == [
        int(row not in (0, 5, 7, 9)) for row in range(18)
    ]


def test_a_second_start_reads_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path / "d")
    first = build(source)
    scanned: list[int] = []
    monkeypatch.setattr(RowScan, "_row", lambda self, draft, number, row, counter: None)
    monkeypatch.setattr(
        RowScan, "rows", lambda self, rows, **_: scanned.extend(rows) or SourceIndex.joined([])
    )
    monkeypatch.setattr(opening, "_looked_again", lambda kept, scan: kept)
    assert same(build(source), first)
    assert scanned == []


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    source = source_of(tmp_path / "d", 64)
    columns = build(source).columns
    for name in ("text_tokens", "target_tokens", "first_image", "image_size", "id_hash"):
        assert isinstance(columns.array(name), np.memmap)
    assert not columns.text_tokens.flags.writeable


def test_another_file_tokenizer_or_plan_is_another_index(tmp_path: Path) -> None:
    source, encoder = source_of(tmp_path / "d"), make_encoder()
    key = source_key(source, encoder, deep=False)
    assert key == source_key(source, make_encoder(), deep=False)
    assert key == source_key(source.model_copy(update={"epochs": 2.0}), encoder, deep=False)
    changed = [
        source_key(source, make_encoder(system="Be brief."), deep=False),
        source_key(source, make_encoder("llama_2"), deep=False),
        source_key(source, make_encoder(image_plan=make_plan(size_px=56)), deep=False),
        source_key(source.model_copy(update={"max_rows": 3}), encoder, deep=False),
        source_key(source, encoder, deep=True),
    ]
    content = Path(source.path).read_bytes()
    Path(source.path).write_bytes(content.replace(b"What", b"Whom", 1))
    changed.append(source_key(source, encoder, deep=False))
    assert len({key, *changed}) == 7


def test_a_folder_is_marked_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "a.json").write_text("{}")
    before = file_mark(tmp_path / "d")
    assert file_mark(tmp_path / "d") == before
    (tmp_path / "d" / "e" / "b.json").write_text("{}")
    assert file_mark(tmp_path / "d") != before


def task_of(source: SourceConfig, folder: Path) -> Build:
    reader = open_source(source)
    return Build(folder, RowScan(reader, make_encoder()), len(reader), unit_rows=4, meta={})


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path / "d")
    task = task_of(source, tmp_path / "index")
    number = 0

    def dying(self: RowScan, rows: Any, **_: Any) -> SourceIndex:
        nonlocal number
        number += 1
        if number == 3:
            os._exit(9)
        return real(self, rows)

    real = RowScan.rows
    child = multiprocessing.get_context("fork").Process(target=lambda: task.work())
    with monkeypatch.context() as patched:
        patched.setattr(RowScan, "rows", dying)
        child.start()
        child.join()
    assert child.exitcode == 9
    assert len(task.done()) == 2
    scanned: list[range] = []

    def watched(self: RowScan, rows: Any, **_: Any) -> SourceIndex:
        scanned.append(rows)
        return real(self, rows)

    monkeypatch.setattr(building, "_STALE_S", -1.0)  # as if a minute had gone by
    monkeypatch.setattr(RowScan, "rows", watched)
    building.build(task, workers=0)
    assert len(scanned) == 3  # of five units, two were done
    plain = real(task.scan, range(18))
    assert same(SourceIndex.load(tmp_path / "index"), plain)
    assert not task.parts.exists()


def test_a_claim_that_is_alive_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(source_of(tmp_path / "d"), tmp_path / "index")
    task.parts.mkdir()
    (task.parts / "claim-0").touch()
    assert not task._take(0)
    old = time.time() - 120
    os.utime(task.parts / "claim-0", (old, old))
    assert task._take(0)
    assert task.done() == {0}


def _rank(source: SourceConfig, rank: int, results: Any) -> None:
    index = index_source(source, open_source(source), make_encoder(), rank=rank, world_size=3)
    results.put(int(index.columns.text_tokens.sum()))


def test_ranks_build_together(tmp_path: Path, cache: Path) -> None:
    source = source_of(tmp_path / "d", 40)
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(source, rank, results)) for rank in range(3)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert [one.exitcode for one in ranks] == [0, 0, 0]
    found = {results.get() for _ in ranks}
    assert found == {int(build(source).columns.text_tokens.sum())}
    assert len(list(cache.iterdir())) == 1


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_until(is_so: Callable[[], bool], *, most_s: float = 20.0) -> None:
    until = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for processes")
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_finish_what_a_killed_one_left(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Three ranks at one folder; one is killed with SIGKILL while it holds a claim."""
    source = source_of(tmp_path / "d", 90)
    reader = open_source(source)
    plain = RowScan(reader, make_encoder()).rows(range(len(reader)))
    slow = RowScan._row

    def row(self: RowScan, *given: Any) -> None:
        time.sleep(0.02)  # long enough to be killed in the middle
        slow(self, *given)

    monkeypatch.setattr(RowScan, "_row", row)
    monkeypatch.setattr(building, "_STALE_S", 0.4)  # instead of a minute
    monkeypatch.setattr(building, "_TOUCH_S", 0.05)
    context = multiprocessing.get_context("fork")

    def rank(number: int) -> None:
        index_source(source, reader, make_encoder(), workers=workers, rank=number, world_size=3)

    ranks = [context.Process(target=rank, args=(number,)) for number in range(3)]
    for one in ranks:
        one.start()
    key = source_key(source, make_encoder(), deep=False)
    parts = cache / f"{key}.parts"
    doomed = ranks[1]
    assert doomed.pid is not None
    pid = doomed.pid
    _wait_until(lambda: len(list(parts.glob("done-*"))) >= 2 and len(_children(pid)) >= workers)
    children = _children(pid)
    os.kill(pid, signal.SIGKILL)
    assert not (cache / key).exists()  # it was not done yet
    for one in ranks:
        one.join(30)
    assert [one.exitcode for one in ranks] == [0, -signal.SIGKILL, 0]
    assert same(SourceIndex.load(cache / key), plain)
    assert [path.name for path in cache.iterdir()] == [key]
    assert len(children) >= workers
    _wait_until(lambda: all(_has_ended(child) for child in children))


def _die(*_: Any, **__: Any) -> None:
    os._exit(9)


def test_a_process_that_dies_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "d")
    monkeypatch.setattr(RowScan, "rows", _die)
    with pytest.raises(DataError, match="process that checked rows died"):
        build(source, workers=2)


def test_images_that_arrive_later_are_seen(tmp_path: Path) -> None:
    source = source_of(tmp_path / "d")
    assert 9 in build(source).rejected
    Image.new("RGB", (50, 20)).save(tmp_path / "d" / "gone.jpg")
    again = build(source)
    assert 9 not in again.rejected
    reader = open_source(source)
    plain = RowScan(reader, make_encoder()).rows(range(len(reader)))
    assert same(again, plain)


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    source = source_of(tmp_path / "d")
    first = build(source)
    assert first.folder is not None
    (first.folder / "text_tokens.npy").write_bytes(b"x" * 200)
    again = build(source)
    assert again.columns.text_tokens.sum() > 0
    (first.folder / "meta.json").unlink()
    assert build(source).columns.text_tokens.sum() > 0


def test_fresh_believes_nothing(tmp_path: Path) -> None:
    source = source_of(tmp_path / "d")
    build(source)
    (tmp_path / "d" / "3.jpg").unlink()
    assert 3 not in build(source).rejected
    assert 3 in build(source, fresh=True).rejected


def test_long_rows_are_read_once_for_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, encoder = source_of(tmp_path / "d"), make_encoder()
    longest = check_sources([source], encoder, max_tokens=4000, overlong="error").lengths.max()
    options: dict[str, Any] = {"max_tokens": int(longest) - 10, "overlong": "truncate_text"}
    first = check_sources([source], encoder, **options)
    assert first.notes["truncated"] > 2
    monkeypatch.setattr("vistune.data.limits._Job.run", None)
    again = check_sources([source], encoder, **options)
    assert again.to_json() == first.to_json()
    assert np.array_equal(again.lengths, first.lengths)


def test_scripts_and_answers_that_stop(tmp_path: Path) -> None:
    texts = ["A dog runs.", "一只狗在草地上奔跑。", "犬が走っています。", "Собака бежит.", "123"]
    rows: list[Any] = [{"conversations": talk("?", text)} for text in texts]
    rows += [{"conversations": talk("?", "on and on " * 40 + end)} for end in ("and", "done.")]
    report = check_sources(
        [SourceConfig(path=str(write_rows(tmp_path, rows)))],
        make_encoder(),
        max_tokens=4000,
        overlong="error",
    )
    assert report.scripts == {"latin": 3, "chinese": 1, "japanese": 1, "cyrillic": 1, "none": 1}
    assert report.notes == {"answer_seems_cut_off": 1}
    assert report.note_rows["answer_seems_cut_off"] == ["train.jsonl:6 (id train:5)"]


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_images_that_look_alike_are_found_when_decoding(tmp_path: Path) -> None:
    photo(1, (160, 120)).save(tmp_path / "a.jpg", quality=95)
    photo(1, (160, 120)).save(tmp_path / "b.png")
    photo(2, (160, 120)).save(tmp_path / "c.jpg")
    names = ["a.jpg", "a.jpg", "c.jpg", "b.png"]
    rows: list[Any] = [
        {"id": k, "image": name, "conversations": talk("<image>", f"No. {k}")}
        for k, name in enumerate(names)
    ]
    source = SourceConfig(path=str(write_rows(tmp_path, rows)))
    report = check_sources([source], make_encoder(), max_tokens=900, overlong="error", deep=True)
    assert report.notes == {"duplicate_image": 1}  # the same file in two rows is none
    assert report.note_rows["duplicate_image"] == ["train.jsonl:4 (id 3)"]
    shallow = check_sources([source], make_encoder(), max_tokens=900, overlong="error")
    assert not shallow.notes


def test_the_look_of_an_image_survives_saving_and_scaling(tmp_path: Path) -> None:
    looks = []
    for seed in range(6):
        image = photo(seed, (320, 240))
        image.save(tmp_path / "x.jpg", quality=60)
        with Image.open(ImageRef(tmp_path / "x.jpg", "x").path) as saved:
            again = look_of(saved.resize((200, 150)).convert("RGB"))
        assert (look_of(image) ^ again).bit_count() <= 6
        looks.append(look_of(image))
    assert min((a ^ b).bit_count() for a in looks for b in looks if a != b) > 12


def test_equal_rows_are_remarked(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": k, "conversations": talk("Hi", "Ho")} for k in (1, 2, 2)]
    report = check_sources(
        [SourceConfig(path=str(write_rows(tmp_path, rows)))],
        make_encoder(),
        max_tokens=900,
        overlong="error",
    )
    assert report.notes == {"duplicate_id": 1, "duplicate_row": 2}
    assert json.dumps(report.to_json())

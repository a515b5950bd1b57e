"""The loader hands out whole steps, resumes by number, and never puts another row in place."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_encoder, make_images, talk, write_rows

from vistune.data.encode import Encoder
from vistune.data.loader import TrainData
from vistune.errors import DataError
from vistune.recipe import BatchConfig, DataConfig, SourceConfig
from vistune.types import Batch


def dataset(folder: Path, number: int = 20) -> Path:
    rows = []
    for k, name in enumerate(make_images(folder, number)):
        text = f"Thing {k} " * (k % 4 + 1)
        rows.append({"id": k, "image": name, "conversations": talk("<image>\nWhat?", text)})
    return write_rows(folder, rows)


def train_data(path: Path, *, batch: BatchConfig | None = None, **change: Any) -> TrainData:
    source = SourceConfig(path=str(path), epochs=change.pop("epochs", 1.0))
    options = {name: change.pop(name) for name in ("world_size", "rank") if name in change}
    data = DataConfig(train=(source,), **{"workers": 0, **change})
    return TrainData(
        data, batch or BatchConfig(max_tokens=300, samples=6), make_encoder(), 0, **options
    )


def ids_of(steps: list[list[Batch]]) -> list[list[tuple[str, ...]]]:
    return [[row.sample_ids for row in step] for step in steps]


def same(a: Batch, b: Batch) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_steps_hold_the_planned_samples(tmp_path: Path) -> None:
    data = train_data(dataset(tmp_path), shuffle=False)
    assert (data.num_samples, data.steps_per_epoch(), data.samples_per_epoch()) == (20, 4, 20)
    steps = list(islice(data.steps(), 5))
    for k, expected in enumerate((range(6), range(6, 12), range(12, 18), range(18, 20), range(6))):
        held = sorted(int(id) for row in steps[k] for id in row.sample_ids)
        assert held == list(expected)
    row = steps[0][0]
    assert row.pixel_values_NCYX is not None
    assert row.pixel_values_NCYX.shape == (row.num_samples, 3, 28, 28)
    assert row.num_image_tokens == 4 * row.num_samples
    assert row.read_s > 0
    assert int(row.cu_seqlens[-1]) == row.num_tokens <= 300


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tokens", [None, 900])
def test_resume_by_step_number_is_exact(tmp_path: Path, workers: int, tokens: int | None) -> None:
    path = dataset(tmp_path)
    batch = BatchConfig(max_tokens=300, tokens=tokens, samples=None if tokens else 6)
    whole = list(islice(train_data(path, batch=batch).steps(), 11))
    for start in (0, 3, 7):
        data = train_data(path, batch=batch, workers=workers)
        again = list(islice(data.steps(start), 11 - start))
        data.close()
        assert ids_of(again) == ids_of(whole[start:])
        for step, expected in zip(again, whole[start:], strict=True):
            assert all(same(a, b) for a, b in zip(step, expected, strict=True))


def test_resume_reads_no_image_again(tmp_path: Path) -> None:
    data = train_data(dataset(tmp_path), shuffle=False)
    for k in range(12):
        (tmp_path / f"{k}.jpg").unlink()
    first = next(data.steps(2))
    assert all(not row.rejected for row in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_fails_later_is_dropped_and_reported(tmp_path: Path, workers: int) -> None:
    batch = BatchConfig(max_tokens=300, samples=2, pack=False)
    data = train_data(dataset(tmp_path, 4), batch=batch, workers=workers, shuffle=False)
    (tmp_path / "1.jpg").write_bytes(b"gone bad")
    steps = list(islice(data.steps(), 2))
    data.close()
    assert ids_of(steps) == [[("0",), ()], [("2",), ("3",)]]
    lost = steps[0][1]
    assert (lost.num_targets, lost.num_tokens) == (0, 1)
    assert [(r.id, r.reason, r.where) for r in lost.rejected] == [
        ("1", "image_unreadable", "train.jsonl:2")
    ]


def test_ranks_share_a_step(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    whole = list(islice(train_data(path).steps(), 8))
    ranks = [
        list(islice(train_data(path, world_size=2, rank=rank).steps(), 8)) for rank in range(2)
    ]
    for k in range(8):
        shared = sorted(id for rank in ranks for row in rank[k] for id in row.sample_ids)
        assert shared == sorted(id for row in whole[k] for id in row.sample_ids)
        assert len(ranks[0][k]) == len(ranks[1][k])


def test_bad_rows_stop_the_run_above_the_fraction(tmp_path: Path) -> None:
    path = dataset(tmp_path, 10)
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 10 rows.*\n.*image_missing: train.jsonl:4"):
        train_data(path)
    data = train_data(path, max_dropped_frac=0.1)
    assert data.num_samples == 9
    held = {id for step in islice(data.steps(), 2) for row in step for id in row.sample_ids}
    assert held == {str(k) for k in range(10)} - {"3"}


def test_overlong_rows_stop_the_run_unless_told_otherwise(tmp_path: Path) -> None:
    rows = [{"conversations": talk("a", "word " * n)} for n in (5, 400)]
    path = write_rows(tmp_path, rows)
    with pytest.raises(DataError, match=r"longer than batch.max_tokens"):
        train_data(path, max_dropped_frac=1.0)
    assert train_data(path, overlong="drop", max_dropped_frac=0.5).num_samples == 1
    assert train_data(path, overlong="truncate_text").num_samples == 2


def test_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"conversations": talk("a", "")}])
    with pytest.raises(DataError, match="none of 1 rows"):
        train_data(path, max_dropped_frac=1.0)
    path = write_rows(tmp_path, [{"conversations": talk("a", "b")}])
    with pytest.raises(DataError, match="holds no sample"):
        train_data(path, epochs=0.1)


class Exploding:
    """Stands for a bug: an exception that is no row's fault."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_stops_the_run_with_its_traceback(tmp_path: Path, workers: int) -> None:
    data = train_data(dataset(tmp_path, 4), workers=workers)
    object.__setattr__(data._rows, "encoder", Exploding())
    with pytest.raises(DataError, match=r"(?s)data worker failed.*ZeroDivisionError: on purpose"):
        next(data.steps())
    data.close()


class Dying:
    def encode(self, *_: Any, **__: Any) -> Any:
        os._exit(9)


def test_a_worker_that_dies_is_a_clear_error(tmp_path: Path) -> None:
    data = train_data(dataset(tmp_path, 4), workers=1)
    object.__setattr__(data._rows, "encoder", Dying())
    with pytest.raises(DataError, match="data worker died"):
        next(data.steps())
    data.close()


def test_close_ends_the_workers(tmp_path: Path) -> None:
    data = train_data(dataset(tmp_path), workers=2)
    steps = data.steps()
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    data.close()
    assert not multiprocessing.active_children()
    assert next(steps, None) is None


def test_a_step_of_many_rows_needs_few_file_descriptors(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    batch = BatchConfig(max_tokens=300, samples=200, pack=False)
    rows = [
        {"image": f"{k % 4}.jpg", "conversations": talk("<image>\nWhat?", "That.")}
        for k in range(400)
    ]
    make_images(tmp_path, 4)
    data = train_data(write_rows(tmp_path, rows), batch=batch, workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limit[1]))
    try:
        held = list(islice(data.steps(), 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        data.close()
    assert [len(step) for step in held] == [200] * 4


def test_no_process_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", no_process)
    assert next(train_data(dataset(tmp_path, 4)).steps())


def test_import_is_cheap() -> None:
    code = (
        "import sys, vistune.data.encode, vistune.data.check, vistune.data.order,"
        " vistune.data.template, vistune.data.formats;"
        "bad = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not bad, bad;"
        "import vistune.data.loader, vistune.data.collate;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_encoder_is_kept_for_the_checkpoint(tmp_path: Path) -> None:
    assert isinstance(train_data(dataset(tmp_path, 2)).encoder, Encoder)

"""Indexing, packing and starting on a dataset in the shape of the public 665k instruction mix.

    python bench/data_index.py FOLDER [--rows 665298] [--tokenizer FOLDER] [--workers 2]

FOLDER receives the dataset (`bench/mix665k.py`) and the cache. What is printed:

- scan: rows a second of CPU time of one process, against tokenising the same rows in full;
- cold and warm: seconds and CPU seconds from nothing to the first packed row of images and tokens,
  the index made first and found the second time (without importing torch or building a model);
- opening: seconds to open the index alone, and one of a million rows;
- packing: how full rows of 4,096 tokens are, and how long planning an epoch takes;
- memory: what a worker process holds of its own with the index open.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))

from data_helpers import llama_tokenizer, make_encoder, make_plan

import mix665k
from vistune.data.encode import Encoder
from vistune.data.formats import open_source
from vistune.data.index import RowColumns, RowScan, SourceIndex
from vistune.data.loader import TrainData
from vistune.recipe import BatchConfig, DataConfig, SourceConfig
from vistune.types import VisionGrid

SIDE_PX, PATCH_PX = 336, 14


def encoder_of(tokenizer_folder: Path | None) -> Encoder:
    tokenizer: Any = llama_tokenizer()
    template = "vicuna_v1"
    if tokenizer_folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        template = "vicuna_v1" if tokenizer.eos_token == "</s>" else "chatml"
    return make_encoder(
        template,
        tokenizer,
        image_plan=make_plan(size_px=SIDE_PX),
        grid=VisionGrid(PATCH_PX, fixed_size_px=SIDE_PX),
    )


@contextmanager
def measured(what: str) -> Iterator[None]:
    began, before = time.perf_counter(), os.times()
    yield
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    print(f"{what}: {time.perf_counter() - began:.2f} s, {cpu:.2f} CPU s", flush=True)


def bench_scan(source: SourceConfig, encoder: Encoder) -> None:
    reader = open_source(source)
    scan = RowScan(reader, encoder)
    number = min(len(reader), 40_000)
    unit = number // 10
    speeds = []
    for first in range(0, number, unit):
        began = time.process_time()
        found = scan.rows(range(first, first + unit))
        speeds.append(unit / (time.process_time() - began))
    few = range(0, number, number // 500)
    began = time.process_time()
    for row in few:
        encoder.tokenise(reader.read(row))
    full = len(few) / (time.process_time() - began)
    columns = found.columns
    print(
        f"scan: {speeds[-1]:,.0f} rows/s a core (first tenth {speeds[0]:,.0f}, best"
        f" {max(speeds):,.0f}), {found.num_tokenised} tokenised; tokenising every row:"
        f" {full:,.0f} rows/s, ratio {speeds[-1] / full:.1f}; a row has"
        f" {columns.text_tokens.mean():.0f} text tokens"
    )


def bench_start(source: SourceConfig, encoder: Encoder, *, workers: int) -> TrainData:
    config = DataConfig(
        train=(source,), overlong="drop_turn", max_dropped_frac=0.1, workers=workers
    )
    batch = BatchConfig(max_tokens=4096, samples=128)
    data = None
    for name in ("cold", "warm"):
        with measured(f"{name}, to the first row"):
            data = TrainData(config, batch, encoder, 0)
            next(data.steps())
            data.close()
    assert data is not None
    print(f"rejected: {data.report.by_reason()}, changed: {dict(data.report.notes)}")
    return data


def bench_open(data: TrainData, cache: Path) -> None:
    folder = next((cache / "vistune" / "index").iterdir())
    with measured("opening the index alone"):
        index = SourceIndex.load(folder)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        repeats = -(-1_000_000 // len(index.columns))
        SourceIndex(RowColumns.joined([index.columns] * repeats), {}, index.note_names).save(
            Path(name)
        )
        with measured(f"opening {repeats * len(index.columns):,} rows"):
            SourceIndex.load(Path(name))


def bench_packing(source: SourceConfig, data: TrainData, encoder: Encoder) -> None:
    report = data.report
    for kind, batch in (
        ("steps of 128 samples", BatchConfig(max_tokens=4096, samples=128)),
        ("steps of 131,072 tokens", BatchConfig(max_tokens=4096, tokens=131_072)),
    ):
        config = DataConfig(train=(source,), overlong="drop_turn", max_dropped_frac=0.1, workers=0)
        other = TrainData(config, batch, encoder, 1, report=report)
        began = time.process_time()
        plan = other._new_plan(0)
        taken = time.process_time() - began
        rows = int(plan.row_ends.size)
        print(
            f"packing, {kind}: rows of 4,096 are {report.num_tokens / (rows * 4096):.2%} full;"
            f" {len(plan)} steps; {taken:.2f} CPU s"
        )
    lengths = np.random.default_rng(0).permutation(report.lengths)
    padded = lengths[: lengths.size // 16 * 16].reshape(-1, 16)
    print(f"random batches of 16, padded, are {padded.mean() / padded.max(axis=1).mean():.2%} full")


def memory_kb(kind: str) -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def bench_memory(data: TrainData) -> None:
    gc.freeze()
    report = data.report
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # a worker: reads rows here and there, as training does
        order = np.random.default_rng(0).permutation(report.num_ok)[:2_000]
        for index in order.tolist():
            report.readers[0].read(int(report.accepted[0][index]))
        own = memory_kb("Private_Dirty:")
        os.write(write_end, f"{own} {memory_kb('Pss:')} {memory_kb('Rss:')}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    own, pss, rss = (int(part) / 1024 for part in os.read(read_end, 100).split())
    print(
        f"a worker with {report.total_rows:,} rows open holds {own:.0f} MiB of its own (PSS"
        f" {pss:.0f}, RSS {rss:.0f} MiB, Python, torch and pages of the dataset file included)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=mix665k.NUM_ROWS)
    parser.add_argument("--tokenizer", type=Path, help="folder of a transformers tokenizer")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    path = mix665k.write(options.folder, options.rows)
    source = SourceConfig(path=str(path), images=str(options.folder))
    encoder = encoder_of(options.tokenizer)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        os.environ["XDG_CACHE_HOME"] = name
        bench_scan(source, encoder)
        data = bench_start(source, encoder, workers=options.workers)
        bench_open(data, Path(name))
        bench_packing(source, data, encoder)
        bench_memory(data)


if __name__ == "__main__":
    main()

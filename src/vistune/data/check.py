"""Reads every row of the sources before a run, by headers only, and says which cannot be used.

What `TrainData` trains on is exactly what this accepted: lengths are counted here once, and every
row that was set aside is listed with its reason.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.encode import Encoder, Overlong, fit
from vistune.data.formats import RowReader, open_source
from vistune.data.image import load
from vistune.data.rejects import reject
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Rejected

_CHUNK_ROWS = 512
_ROWS_WORTH_A_PROCESS = 4_096
_DEEP_ROWS_WORTH_A_PROCESS = 256


@dataclass
class CheckReport:
    """What a check found.

    Args:
        sources: Names of the sources, in order.
        num_rows: Rows of every source.
        accepted: int64 [rows] per source; numbers of the usable rows.
        lengths: int32 [samples]; tokens of every usable row, sources end to end.
        rejected: Rows set aside, sources end to end.
        notes: How often a rule changed or remarked a usable row, by short name.
        num_image_tokens: Image tokens of all usable rows.
        num_target_tokens: Target tokens of all usable rows.
        num_images: Images of all usable rows.
        readers: The sources, still open, so that nobody has to find their rows again.
    """

    sources: tuple[str, ...]
    num_rows: tuple[int, ...]
    accepted: tuple[npt.NDArray[np.int64], ...]
    lengths: npt.NDArray[np.int32]
    rejected: list[Rejected]
    notes: Counter[str] = field(default_factory=Counter)
    num_image_tokens: int = 0
    num_target_tokens: int = 0
    num_images: int = 0
    readers: tuple[RowReader, ...] = field(default=(), repr=False)

    @property
    def total_rows(self) -> int:
        """Rows of all sources."""
        return sum(self.num_rows)

    @property
    def num_ok(self) -> int:
        """Usable rows of all sources."""
        return int(self.lengths.size)

    @property
    def num_tokens(self) -> int:
        """Tokens of all usable rows, image tokens included."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def rejected_frac(self) -> float:
        """Rows set aside as a fraction of all rows."""
        return len(self.rejected) / self.total_rows if self.total_rows else 0.0

    def by_reason(self) -> dict[str, int]:
        """Returns how many rows were set aside, by reason, most frequent first."""
        return dict(Counter(row.reason for row in self.rejected).most_common())

    def table(self) -> str:
        """Returns the reasons as lines of text, each with its first row and its fix."""
        first = {row.reason: row for row in reversed(self.rejected)}
        lines = []
        for reason, number in self.by_reason().items():
            row = first[reason]
            lines.append(f"{number:>8}  {reason}: {row.where}: {row.detail}")
            if row.fix:
                lines.append(f"{'':>10}fix: {row.fix}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the report in JSON's types; lengths as five numbers."""
        spread = None
        if self.num_ok:
            names = ("min", "p50", "p90", "p99", "max")
            values = np.percentile(self.lengths, [0, 50, 90, 99, 100], method="nearest")
            spread = {name: int(v) for name, v in zip(names, values, strict=True)}
        return {
            "sources": [
                {"name": name, "rows": rows, "ok": int(ok.size)}
                for name, rows, ok in zip(self.sources, self.num_rows, self.accepted, strict=True)
            ],
            "num_rows": self.total_rows,
            "num_ok": self.num_ok,
            "num_rejected": len(self.rejected),
            "by_reason": self.by_reason(),
            "notes": dict(self.notes.most_common()),
            "num_images": self.num_images,
            "num_tokens": self.num_tokens,
            "num_image_tokens": self.num_image_tokens,
            "num_target_tokens": self.num_target_tokens,
            "tokens_per_row": spread,
        }

    def write_quarantine(self, path: Path) -> None:
        """Writes one JSON line for every row set aside; an empty file when there is none."""
        with path.open("w", encoding="utf-8") as file:
            for row in self.rejected:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


@dataclass
class _Found:
    """What a chunk of rows gave."""

    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    num_image_tokens: int = 0
    num_target_tokens: int = 0
    num_images: int = 0


@dataclass(frozen=True)
class _Job:
    """What every process needs to check rows."""

    readers: tuple[RowReader, ...]
    encoder: Encoder
    max_tokens: int
    overlong: Overlong
    deep: bool

    def run(self, source: int, first: int, stop: int) -> _Found:
        reader, found = self.readers[source], _Found()
        for row in range(first, stop):
            self._row(reader, row, found)
        return found

    def _row(self, reader: RowReader, row: int, found: _Found) -> None:
        where, id = reader.where(row), None
        try:
            sample = reader.read(row)
            id = sample.id
            tokens = self.encoder.tokenise(sample)
            tokens = fit(tokens, max_tokens=self.max_tokens, policy=self.overlong)
            if self.deep:
                for image in sample.images:
                    load(image, self.encoder.image_plan)
        except RowError as error:
            found.rejected.append(reject(error, source=reader.name, where=where, id=id))
            return
        found.rows.append(row)
        found.ids.append(sample.id)
        found.lengths.append(int(tokens.ids.size))
        found.num_images += len(tokens.image_order)
        found.num_image_tokens += tokens.num_image_tokens
        found.num_target_tokens += int(tokens.mask[1:].sum())
        found.notes.update(sample.notes)
        if tokens.truncated:
            found.notes["truncated"] += 1
        if self.encoder.special_text(sample.turns):
            found.notes["special_token_in_text"] += 1


def check_sources(
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    *,
    max_tokens: int,
    overlong: Overlong,
    deep: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks every row.

    Args:
        sources: The sources.
        encoder: How rows become tokens.
        max_tokens: Tokens a row may have.
        overlong: What is done with longer ones.
        deep: Decode every image instead of trusting its header and its end.
        workers: Processes; 0 or few rows: in this one.
        progress: Called with (rows done, rows in all) every few hundred rows.

    Raises:
        DataError: A source cannot be opened, or a worker process died.
    """
    opened = tuple(open_source(source) for source in sources)
    job = _Job(opened, encoder, max_tokens, overlong, deep)
    chunks = [
        (source, first, min(first + _CHUNK_ROWS, len(reader)))
        for source, reader in enumerate(opened)
        for first in range(0, len(reader), _CHUNK_ROWS)
    ]
    total = sum(len(reader) for reader in opened)
    worth = total >= (_DEEP_ROWS_WORTH_A_PROCESS if deep else _ROWS_WORTH_A_PROCESS)
    results = _in_processes(job, chunks, workers) if workers and worth else _here(job, chunks)
    found: list[list[_Found]] = [[] for _ in opened]
    done = 0
    for (source, first, stop), result in zip(chunks, results, strict=True):
        found[source].append(result)
        done += stop - first
        if progress is not None:
            progress(done, total)
    return _report(opened, found)


def _report(readers: Sequence[RowReader], found: Sequence[Sequence[_Found]]) -> CheckReport:
    flat = [part for parts in found for part in parts]
    notes: Counter[str] = Counter()
    for part in flat:
        notes.update(part.notes)
    for parts in found:
        counts = Counter(id for part in parts for id in part.ids)
        repeated = sum(number - 1 for number in counts.values())
        if repeated:
            notes["duplicate_id"] += repeated
    return CheckReport(
        sources=tuple(reader.name for reader in readers),
        num_rows=tuple(len(reader) for reader in readers),
        accepted=tuple(
            np.array([row for part in parts for row in part.rows], dtype=np.int64)
            for parts in found
        ),
        lengths=np.array([n for part in flat for n in part.lengths], dtype=np.int32),
        rejected=[row for part in flat for row in part.rejected],
        notes=notes,
        num_image_tokens=sum(part.num_image_tokens for part in flat),
        num_target_tokens=sum(part.num_target_tokens for part in flat),
        num_images=sum(part.num_images for part in flat),
        readers=tuple(readers),
    )


def _here(job: _Job, chunks: Sequence[tuple[int, int, int]]) -> Iterator[_Found]:
    for chunk in chunks:
        yield job.run(*chunk)


class _Process:
    """The job of this worker process; set once by the pool's initializer."""

    job: _Job

    @classmethod
    def start(cls, job: _Job) -> None:
        cls.job = job

    @classmethod
    def run(cls, chunk: tuple[int, int, int]) -> _Found:
        return cls.job.run(*chunk)


def _in_processes(
    job: _Job, chunks: Sequence[tuple[int, int, int]], workers: int
) -> Iterator[_Found]:
    # Forking costs nothing and shares the row index; the check runs before any device or thread of
    # ours exists. Where forking is unsafe (macOS) or missing, processes start afresh.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    number = min(workers, len(chunks))
    try:
        with ProcessPoolExecutor(number, context, _Process.start, (job,)) as pool:
            yield from pool.map(_Process.run, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that checked rows died, most likely killed for memory",
            fix="data.workers=0, or fewer",
        ) from error

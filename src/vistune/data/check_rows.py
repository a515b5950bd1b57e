"""Checks one source where no model is named: form, turns and images, without tokens.

What a run would check besides, how long rows become, needs a template and a tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vistune.data.formats import RowReader
from vistune.data.headers import Sizes
from vistune.data.image import ImagePlan, load
from vistune.data.index.columns import SCRIPTS
from vistune.data.index.scan import (
    content_hash,
    content_name,
    hash64,
    look_of,
    script_of,
    seems_cut_off,
)
from vistune.data.pool import in_processes
from vistune.data.rejects import reject
from vistune.errors import RowError
from vistune.types import Rejected, Sample

_EXAMPLES = 4
_UNIT_ROWS, _DEEP_UNIT_ROWS = 1_024, 64


@dataclass
class RowsReport:
    """What a check of one source found.

    Args:
        source: Its name.
        num_rows: Its rows.
        num_ok: Usable rows.
        num_images: Images of these.
        num_turns: Turns of these.
        rejected: Rows that cannot be used.
        notes: Remarks on usable rows, by short name.
        note_rows: The first rows of every remark.
        scripts: Usable rows by the script that most of their text is written in.
    """

    source: str
    num_rows: int
    num_ok: int = 0
    num_images: int = 0
    num_turns: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    note_rows: dict[str, list[str]] = field(default_factory=dict)
    scripts: Counter[str] = field(default_factory=Counter)

    def by_reason(self) -> dict[str, int]:
        """Returns how many rows cannot be used, by reason, most frequent first."""
        return dict(Counter(row.reason for row in self.rejected).most_common())

    def to_json(self) -> dict[str, Any]:
        """Returns the report in JSON's types."""
        return {
            "rows": self.num_rows,
            "usable": self.num_ok,
            "images": self.num_images,
            "turns": self.num_turns,
            "by_reason": self.by_reason(),
            "notes": dict(self.notes.most_common()),
            "note_rows": self.note_rows,
            "scripts": dict(self.scripts.most_common()),
        }


def check_rows(
    reader: RowReader,
    plan: ImagePlan,
    *,
    deep: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RowsReport:
    """Reads every row of a source, its images by their headers.

    Args:
        reader: The source.
        plan: Carries the limit on an image's pixels.
        deep: Decode every image, and find images that look alike.
        workers: Processes; 0, or few rows: in this one.
        progress: Told (rows done, rows in all) every now and then.

    Raises:
        DataError: A process died.
    """
    total, unit = len(reader), _DEEP_UNIT_ROWS if deep else _UNIT_ROWS
    units = [range(first, min(first + unit, total)) for first in range(0, total, unit)]
    look = _Look(reader, plan, deep)
    report = _Report(reader)
    fix = "vistune data check --workers 0"
    parts = in_processes(look.rows, units, workers=workers, fix=fix)
    for rows, part in zip(units, parts, strict=True):
        report.add(part)
        if progress is not None:
            progress(rows.stop, total)
    return report.found


@dataclass
class _Part:
    """What was found in some rows."""

    num_images: int = 0
    num_turns: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    notes: list[tuple[str, int]] = field(default_factory=list)
    scripts: Counter[str] = field(default_factory=Counter)
    hashes: list[tuple[int, int, int]] = field(default_factory=list)
    """Row, hash of its id, hash of its content; of every usable row."""
    looks: list[tuple[int, int, int]] = field(default_factory=list)
    """Row, what an image of it looks like, which file that is."""


class _Look:
    """Reads rows; lives in the workers."""

    def __init__(self, reader: RowReader, plan: ImagePlan, deep: bool) -> None:
        self._reader, self._plan, self._deep = reader, plan, deep
        self._sizes = Sizes(plan)

    def rows(self, rows: Iterable[int]) -> _Part:
        part = _Part()
        for row in rows:
            id = None
            try:
                sample = self._reader.read(row)
                id = sample.id
                looks = self._looks(sample)
            except RowError as error:
                name, where = self._reader.name, self._reader.where(row)
                part.rejected.append(reject(error, source=name, where=where, id=id))
                continue
            part.looks += [(row, look, file) for look, file in looks]
            self._count(part, row, sample)
        return part

    def _looks(self, sample: Sample) -> list[tuple[int, int]]:
        """Looks at every image; returns what they look like where they are decoded."""
        for image in sample.images:
            self._sizes.of(image)
        if not self._deep:
            return []
        return [
            (look_of(load(image, self._plan)), hash64(content_name(image)))
            for image in sample.images
        ]

    def _count(self, part: _Part, row: int, sample: Sample) -> None:
        part.num_images += len(sample.images)
        part.num_turns += len(sample.turns)
        texts = [turn.text for turn in sample.turns]
        text = "\n".join(texts)
        part.scripts[SCRIPTS[script_of(text)]] += 1
        part.notes += [(note, row) for note in sample.notes]
        if seems_cut_off(texts[-1]):
            part.notes.append(("answer_seems_cut_off", row))
        id = hash64(sample.id.encode("utf-8", "surrogatepass"))
        part.hashes.append((row, id, content_hash(sample, text)))


class _Report:
    """Puts parts together, in the order of the rows."""

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader
        self.found = RowsReport(reader.name, len(reader))
        self._ids: set[int] = set()
        self._contents: set[int] = set()
        self._looks: dict[int, int] = {}

    def add(self, part: _Part) -> None:
        found = self.found
        found.num_ok += len(part.hashes)
        found.num_images += part.num_images
        found.num_turns += part.num_turns
        found.rejected += part.rejected
        found.scripts += part.scripts
        for name, row in part.notes:
            self._note(name, row)
        for row, id, content in part.hashes:
            if id in self._ids:
                self._note("duplicate_id", row)
            if content in self._contents:
                self._note("duplicate_row", row)
            self._ids.add(id)
            self._contents.add(content)
        for row, look, file in part.looks:
            if self._looks.setdefault(look, file) != file:
                self._note("duplicate_image", row)

    def _note(self, name: str, row: int) -> None:
        self.found.notes[name] += 1
        first = self.found.note_rows.setdefault(name, [])
        if len(first) < _EXAMPLES:
            first.append(f"{self._reader.where(row)} (id {self._reader.read(row).id})")


__all__ = ["RowsReport", "check_rows"]

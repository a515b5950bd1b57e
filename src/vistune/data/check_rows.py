"""Checks one source where no model is named: form, turns and images, without tokens.

What a run would check besides, how long rows become, needs a template and a tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
from vistune.data.rejects import reject
from vistune.errors import RowError
from vistune.types import Rejected, Sample

_EXAMPLES = 4
_TOLD_EVERY_ROWS = 256


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
    progress: Callable[[int, int], None] | None = None,
) -> RowsReport:
    """Reads every row of a source, its images by their headers.

    Args:
        reader: The source.
        plan: Carries the limit on an image's pixels.
        deep: Decode every image, and find images that look alike.
        progress: Told (rows done, rows in all) every now and then.
    """
    return _Check(reader, plan, deep=deep).run(progress)


class _Check:
    def __init__(self, reader: RowReader, plan: ImagePlan, *, deep: bool) -> None:
        self._reader, self._plan, self._deep = reader, plan, deep
        self._sizes = Sizes(plan)
        self._report = RowsReport(reader.name, len(reader))
        self._ids: set[int] = set()
        self._contents: set[int] = set()
        self._looks: dict[int, int] = {}  # what an image looks like -> which file

    def run(self, progress: Callable[[int, int], None] | None) -> RowsReport:
        report = self._report
        for row in range(report.num_rows):
            if progress is not None and row % _TOLD_EVERY_ROWS == 0:
                progress(row, report.num_rows)
            id = None
            try:
                sample = self._reader.read(row)
                id = sample.id
                looks = self._looked(sample)
            except RowError as error:
                where = self._reader.where(row)
                report.rejected.append(reject(error, source=report.source, where=where, id=id))
                continue
            self._count(sample, looks)
        if progress is not None:
            progress(report.num_rows, report.num_rows)
        return report

    def _looked(self, sample: Sample) -> Sequence[int]:
        """Looks at every image; returns what they look like where they were decoded."""
        for image in sample.images:
            self._sizes.of(image)
        if not self._deep:
            return ()
        return [look_of(load(image, self._plan)) for image in sample.images]

    def _count(self, sample: Sample, looks: Sequence[int]) -> None:
        report = self._report
        report.num_ok += 1
        report.num_images += len(sample.images)
        report.num_turns += len(sample.turns)
        texts = [turn.text for turn in sample.turns]
        text = "\n".join(texts)
        report.scripts[SCRIPTS[script_of(text)]] += 1
        for note in sample.notes:
            self._note(note, sample)
        if seems_cut_off(texts[-1]):
            self._note("answer_seems_cut_off", sample)
        id = hash64(sample.id.encode("utf-8", "surrogatepass"))
        content = content_hash(sample, text)
        for name, value, known in (
            ("duplicate_id", id, self._ids),
            ("duplicate_row", content, self._contents),
        ):
            if value in known:
                self._note(name, sample)
            known.add(value)
        for image, look in zip(sample.images, looks, strict=False):
            file = hash64(content_name(image))
            if self._looks.setdefault(look, file) != file:
                self._note("duplicate_image", sample)

    def _note(self, name: str, sample: Sample) -> None:
        self._report.notes[name] += 1
        first = self._report.note_rows.setdefault(name, [])
        if len(first) < _EXAMPLES:
            first.append(f"{sample.where} (id {sample.id})")


__all__ = ["RowsReport", "check_rows"]

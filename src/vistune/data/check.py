"""Reads every row of the sources before a run, by headers only, and says which cannot be used.

What `TrainData` trains on is exactly what this accepted: lengths are counted here once, and every
row that was set aside is listed with its reason. The numbers come from an index of every source
(`data.index`), which large sources keep on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vistune.data.encode import Encoder, Overlong
from vistune.data.formats import RowReader, open_source
from vistune.data.index import SourceIndex, index_source
from vistune.data.index.columns import SCRIPTS
from vistune.data.limits import Limited, limit
from vistune.data.rejects import reject
from vistune.data.report import CheckReport
from vistune.errors import RowError
from vistune.recipe import SourceConfig
from vistune.types import Rejected

_EXAMPLES = 4


def check_sources(
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    *,
    max_tokens: int,
    overlong: Overlong,
    deep: bool = False,
    workers: int = 0,
    fresh: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks every row.

    Args:
        sources: The sources.
        encoder: How rows become tokens.
        max_tokens: Tokens a row may have.
        overlong: What is done with longer ones.
        deep: Decode every image instead of trusting its header and its end, and find images that
            look alike.
        workers: Processes; 0 or few rows: in this one.
        fresh: Read every row again, whatever is kept from an earlier check.
        rank: This rank; ranks that share a cache folder share the work.
        world_size: Number of ranks.
        progress: Called with (rows done, rows in all) every now and then.

    Raises:
        DataError: A source cannot be opened, a worker process died, or the policy for long rows
            can have no effect.
    """
    encoder.require_policy(overlong)
    opened = tuple(open_source(source) for source in sources)
    _tell_apart(sources, opened)
    total, done = sum(map(len, opened)), 0
    checked = []
    for source, reader in zip(sources, opened, strict=True):
        told = None if progress is None else _shifted(progress, done, total)
        index = index_source(
            source,
            reader,
            encoder,
            deep=deep,
            workers=workers,
            fresh=fresh,
            rank=rank,
            world_size=world_size,
            progress=told,
        )
        limited = limit(
            index, reader, encoder, max_tokens=max_tokens, overlong=overlong, workers=workers
        )
        checked.append(_Checked(reader, index, limited))
        done += len(reader)
    return _report(checked)


def _tell_apart(sources: Sequence[SourceConfig], opened: Sequence[RowReader]) -> None:
    """Gives sources that nobody named, and that are called alike, their folders' names as well.

    Otherwise their losses would be one in the metrics. Sources that the recipe calls alike stay so.
    """
    unnamed = [k for k, source in enumerate(sources) if source.name is None]
    taken = Counter(reader.name for reader in opened)
    for k in unnamed:
        reader = opened[k]
        if taken[reader.name] < 2:
            continue
        name = f"{Path(sources[k].path).resolve().parent.name}/{reader.name}"
        number = 2
        while name in taken:
            name, number = f"{name.partition('#')[0]}#{number}", number + 1
        taken[name] += 1
        reader.name = name


def _shifted(
    progress: Callable[[int, int], None], before: int, total: int
) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)


@dataclass(frozen=True)
class _Checked:
    reader: RowReader
    index: SourceIndex
    limited: Limited


def _report(checked: Sequence[_Checked]) -> CheckReport:
    notes: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    rejected: list[Rejected] = []
    for one in checked:
        for name, rows in _noted(one).items():
            notes[name] += rows.number
            known = examples.setdefault(name, [])
            known += [_name_of(one.reader, row) for row in rows.first[: _EXAMPLES - len(known)]]
        usable = one.index.columns.script[one.limited.accepted]
        for number, count in enumerate(np.bincount(usable, minlength=len(SCRIPTS)).tolist()):
            if count:
                scripts[SCRIPTS[number]] += count
        # An index may have been made when the source was called something else.
        rejected += [
            replace(why, source=one.reader.name)
            for _, why in sorted({**one.index.rejected, **one.limited.rejected}.items())
        ]
    limited = [one.limited for one in checked]
    return CheckReport(
        sources=tuple(one.reader.name for one in checked),
        num_rows=tuple(len(one.reader) for one in checked),
        accepted=tuple(part.accepted for part in limited),
        lengths=_joined([part.tokens for part in limited]),
        image_tokens=_joined([part.image_tokens for part in limited]),
        rejected=rejected,
        notes=notes,
        note_rows=examples,
        scripts=scripts,
        num_image_tokens=sum(int(part.image_tokens.sum(dtype=np.int64)) for part in limited),
        num_target_tokens=sum(int(part.target_tokens.sum(dtype=np.int64)) for part in limited),
        num_images=sum(part.num_images for part in limited),
        num_tokenised=sum(one.index.num_tokenised for one in checked),
        readers=tuple(one.reader for one in checked),
    )


def _joined(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class _Rows:
    """How many, and the first of them."""

    number: int
    first: list[int]

    @classmethod
    def of(cls, rows: npt.NDArray[np.int64], *, number: int | None = None) -> _Rows:
        return cls(int(rows.size) if number is None else number, rows[:_EXAMPLES].tolist())


def _noted(one: _Checked) -> dict[str, _Rows]:
    """Returns the remarks on the usable rows of a source."""
    accepted, columns = one.limited.accepted, one.index.columns
    found = {
        name: _Rows.of(accepted[one.index.noted(name)[accepted]]) for name in one.index.note_names
    }
    found.update({name: _Rows.of(rows) for name, rows in one.limited.notes.items()})
    found["duplicate_id"] = _Rows.of(_repeats(columns.id_hash, accepted))
    found["duplicate_row"] = _Rows.of(_repeats(columns.content_hash, accepted))
    if columns.image_hash.size:
        found["duplicate_image"] = _alike_images(one)
    return {name: rows for name, rows in found.items() if rows.number}


def _repeats(values: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the rows whose value an earlier one of the rows has."""
    first = np.unique(np.asarray(values[rows]), return_index=True)[1]
    again = np.ones(rows.size, dtype=np.bool_)
    again[first] = False
    return rows[again]


def _alike_images(one: _Checked) -> _Rows:
    """Returns rows with an image that looks like an earlier one of another name."""
    columns = one.index.columns
    names, at = np.unique(np.asarray(columns.image_name), return_index=True)
    looks = np.asarray(columns.image_hash)[at]
    order = np.argsort(at)  # by first appearance
    repeated = at[order][_repeats(looks[order], np.arange(names.size))]
    rows = np.searchsorted(columns.first_image, repeated, side="right") - 1
    return _Rows.of(np.unique(rows), number=int(repeated.size))


def _name_of(reader: RowReader, row: int) -> str:
    try:
        return f"{reader.where(row)} (id {reader.read(row).id})"
    except RowError:  # the file was changed since
        return reader.where(row)


__all__ = ["CheckReport", "check_sources", "reject"]

"""Finds or makes the index of a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vistune.data.cache import cache_folder
from vistune.data.encode import Encoder
from vistune.data.formats import RowReader
from vistune.data.index.build import Build, build
from vistune.data.index.columns import RowColumns, SourceIndex
from vistune.data.index.key import source_key
from vistune.data.index.scan import RowScan
from vistune.data.kept import discard, tidy
from vistune.recipe import SourceConfig

_ROWS_WORTH_KEEPING = 4_096
_DEEP_ROWS_WORTH_KEEPING = 256
_PER_ROW = set(RowColumns.names()) - {"first_image", "image_size", "image_name", "image_hash"}
_UNIT_ROWS, _DEEP_UNIT_ROWS = 4_096, 128


def index_source(
    source: SourceConfig,
    reader: RowReader,
    encoder: Encoder,
    *,
    deep: bool = False,
    workers: int = 0,
    fresh: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SourceIndex:
    """Returns the index of a source: the one kept from before, or a new one.

    A few thousand rows are scanned here and nothing is kept. An index that is kept is that of the
    same file, template, tokenizer and image plan. Rows that could not be used for their images are
    looked at again, because images are added to folders.

    Args:
        source: The source.
        reader: The source, open.
        encoder: How rows become tokens.
        deep: Decode every image.
        workers: Processes to build with.
        fresh: Do not believe an index kept from before.
        rank: This rank; all ranks build together if they see the same cache folder.
        world_size: Number of ranks.
        progress: Told (rows done, rows in all).

    Raises:
        DataError: The cache cannot be written, or a process died.
    """
    num_rows = len(reader)
    scan = RowScan(reader, encoder, deep)
    if num_rows < (_DEEP_ROWS_WORTH_KEEPING if deep else _ROWS_WORTH_KEEPING):
        found = scan.rows(range(num_rows))
        if progress is not None:
            progress(num_rows, num_rows)
        return found
    key = source_key(source, encoder, deep=deep)
    folder = cache_folder("index") / key
    if fresh and rank == 0:
        discard(folder)
    kept = _kept(folder)
    if kept is None:
        meta = {"path": str(Path(source.path).absolute()), "rows": num_rows, "deep": deep}
        task = Build(
            folder,
            scan,
            num_rows,
            unit_rows=_DEEP_UNIT_ROWS if deep else _UNIT_ROWS,
            meta=meta,
            start_frac=rank / world_size,
        )
        build(task, workers=workers, progress=progress)
        made = SourceIndex.load(folder)
        tidy()
        return made
    return _looked_again(kept, scan)


def _kept(folder: Path) -> SourceIndex | None:
    try:
        return SourceIndex.load(folder)
    except BlockingIOError:
        return None  # it is being removed
    except (OSError, ValueError, KeyError, TypeError):
        discard(folder)  # damaged, or not there: it is made (again)
        return None


def _looked_again(kept: SourceIndex, scan: RowScan) -> SourceIndex:
    rows = [row for row, why in kept.rejected.items() if why.reason.startswith("image_")]
    if not rows:
        return kept
    found = scan.rows(rows)
    if not found.columns.usable.any():
        return kept
    return _with_rows(kept, rows, found)


def _with_rows(kept: SourceIndex, rows: list[int], found: SourceIndex) -> SourceIndex:
    """Returns an index in which some rows are replaced; this one is in memory."""
    names = tuple(dict.fromkeys([*kept.note_names, *found.note_names]))
    old, new = kept.renamed(names), found.renamed(names)
    at = np.array(rows)
    arrays = {}
    for name in RowColumns.names():
        column = old.array(name)
        if name in _PER_ROW:
            column = column.copy()
            column[at] = new.array(name)
        arrays[name] = column
    counts = np.diff(old.first_image)
    fresh_counts = np.diff(new.first_image)
    # The images of a row that was not usable were not kept, so there is nothing to take out.
    place = np.repeat(old.first_image[at], fresh_counts)
    for name in ("image_size", "image_name", "image_hash"):
        fresh = new.array(name)
        if fresh.shape[0]:
            arrays[name] = np.insert(old.array(name), place, fresh, axis=0)
    counts[at] = fresh_counts
    arrays["first_image"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rejected = {row: why for row, why in kept.rejected.items() if row not in set(rows)}
    rejected.update({rows[k]: why for k, why in found.rejected.items()})
    return SourceIndex(
        RowColumns(**arrays), dict(sorted(rejected.items())), names, kept.num_tokenised
    )

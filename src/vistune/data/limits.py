"""What becomes of rows that are longer than one row of a batch: from an index, for one limit.

Only the rows that are too long are read again. How long they are in the end is kept beside the
index, so that the next run with the same limit need not read them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from vistune.data.cache import write_once
from vistune.data.count import TokenCounter
from vistune.data.encode import Encoder, Overlong, Size
from vistune.data.formats import RowReader
from vistune.data.index import SourceIndex
from vistune.data.pool import in_processes
from vistune.data.rejects import reject
from vistune.data.tokens import overlong_error, turns_that_fit
from vistune.errors import RowError
from vistune.types import Rejected, Turn

_CHUNK_ROWS = 256
_CHANGES = ("truncated", "turns_dropped", "images_shrunk")


@dataclass(frozen=True)
class Limited:
    """The rows of a source that are used under a limit.

    Args:
        accepted: int64 [samples]; their numbers.
        tokens: int32 [samples].
        image_tokens: int32 [samples].
        target_tokens: int32 [samples].
        num_images: Images of all of them.
        rejected: Rows that the limit set aside, by number.
        notes: Rows that were changed to fit, by what was done.
    """

    accepted: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    image_tokens: npt.NDArray[np.int32]
    target_tokens: npt.NDArray[np.int32]
    num_images: int
    rejected: dict[int, Rejected] = field(default_factory=dict)
    notes: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)


@dataclass
class _Outcome:
    """What became of some of the rows that were too long."""

    rows: list[int] = field(default_factory=list)
    values: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    rejected: dict[int, Rejected] = field(default_factory=dict)

    def add(self, other: _Outcome) -> None:
        self.rows += other.rows
        self.values += other.values
        self.rejected.update(other.rejected)


def limit(
    index: SourceIndex,
    reader: RowReader,
    encoder: Encoder,
    *,
    max_tokens: int,
    overlong: Overlong,
    workers: int = 0,
) -> Limited:
    """Returns the usable rows of a source under a limit.

    Args:
        index: The index of the source.
        reader: The source.
        encoder: How rows become tokens.
        max_tokens: Tokens a row may have.
        overlong: What is done with longer ones.
        workers: Processes to read them with.

    Raises:
        DataError: A process died.
    """
    columns = index.columns
    usable = np.asarray(columns.usable).copy()
    tokens = columns.text_tokens + columns.image_tokens
    image_tokens, targets = np.array(columns.image_tokens), np.array(columns.target_tokens)
    num_images = np.diff(columns.first_image)
    rows = np.flatnonzero(usable & (tokens > max_tokens))
    notes: dict[str, npt.NDArray[np.int64]] = {}
    outcome = _Outcome()
    if rows.size:
        outcome = _outcome(index, reader, encoder, rows, max_tokens, overlong, workers)
        values = np.array(outcome.values, dtype=np.int64).reshape(-1, 5)
        kept = np.array(outcome.rows, dtype=np.int64)
        tokens[kept], image_tokens[kept], targets[kept] = values[:, 0], values[:, 1], values[:, 2]
        num_images[kept] = values[:, 3]
        usable[np.array(list(outcome.rejected), dtype=np.int64)] = False
        notes = {name: kept[values[:, 4] == k] for k, name in enumerate(_CHANGES)}
    accepted = np.flatnonzero(usable)
    return Limited(
        accepted=accepted,
        tokens=tokens[accepted],
        image_tokens=image_tokens[accepted],
        target_tokens=targets[accepted],
        num_images=int(num_images[accepted].sum()),
        rejected=outcome.rejected,
        notes={name: found for name, found in notes.items() if found.size},
    )


def _outcome(
    index: SourceIndex,
    reader: RowReader,
    encoder: Encoder,
    rows: npt.NDArray[np.int64],
    max_tokens: int,
    overlong: Overlong,
    workers: int,
) -> _Outcome:
    path = None
    if index.folder is not None:
        path = index.folder / f"limit-{max_tokens}-{overlong}.json"
        if path.is_file():
            return _loaded(json.loads(path.read_text(encoding="utf-8")))
    job = _Job(index, reader, encoder, max_tokens, overlong, TokenCounter(encoder))
    chunks = [rows[k : k + _CHUNK_ROWS].tolist() for k in range(0, rows.size, _CHUNK_ROWS)]
    found = _Outcome()
    fix = "data.workers=0, or fewer"
    for part in in_processes(job.run, chunks, workers=workers, fix=fix):
        found.add(part)
    if path is not None:
        content = asdict(found)
        write_once(path, lambda file: file.write(json.dumps(content).encode()))
    return found


def _loaded(content: dict[str, object]) -> _Outcome:
    outcome = _Outcome(**content)  # type: ignore[arg-type]
    outcome.rejected = {
        int(row): Rejected(**why)  # type: ignore[arg-type]
        for row, why in outcome.rejected.items()
    }
    return outcome


@dataclass(frozen=True)
class _Job:
    index: SourceIndex
    reader: RowReader
    encoder: Encoder
    max_tokens: int
    overlong: Overlong
    counter: TokenCounter

    def run(self, rows: Sequence[int]) -> _Outcome:
        found = _Outcome()
        for row in rows:
            id = None
            try:
                sample = self.reader.read(row)
                id = sample.id
                found.values.append(self._fit(row, sample.turns))
                found.rows.append(row)
            except RowError as error:
                name, where = self.reader.name, self.reader.where(row)
                found.rejected[row] = reject(error, source=name, where=where, id=id)
        return found

    def _fewer_turns(
        self, row: int, turns: Sequence[Turn], sizes: Sequence[Size]
    ) -> tuple[int, int, int, int, int]:
        # What `Encoder.fitted` does, by counting alone.
        def count(kept: Sequence[Turn]) -> int:
            return self.counter.count(kept, sizes).tokens

        number = turns_that_fit(turns, self.max_tokens, count)
        if not number:
            raise self._refusal(row)
        counts = self.counter.count(turns[:number], sizes)
        if not counts.target_tokens:
            raise RowError("no token is a target", reason="no_target", fix="give the row an answer")
        images = sum(isinstance(part, int) for turn in turns[:number] for part in turn.parts)
        return counts.tokens, counts.image_tokens, counts.target_tokens, images, 1

    def _refusal(self, row: int) -> RowError:
        columns = self.index.columns
        first, stop = columns.first_image[row : row + 2].tolist()
        return overlong_error(
            int(columns.text_tokens[row]),
            int(columns.image_tokens[row]),
            num_images=stop - first,
            max_tokens=self.max_tokens,
        )

    def _fit(self, row: int, turns: Sequence[Turn]) -> tuple[int, int, int, int, int]:
        columns = self.index.columns
        first, stop = columns.first_image[row : row + 2].tolist()
        if self.overlong in ("error", "drop"):
            raise self._refusal(row)
        sizes = [(int(h), int(w)) for h, w in columns.image_size[first:stop].tolist()]
        if self.overlong == "drop_turn":
            return self._fewer_turns(row, turns, sizes)
        tokens = self.encoder.fitted(
            turns,
            sizes,
            max_tokens=self.max_tokens,
            overlong=self.overlong,
        )
        change = 0 if tokens.truncated else 1 if tokens.dropped_turns else 2
        return (
            int(tokens.ids.size),
            tokens.num_image_tokens,
            int(tokens.mask[1:].sum()),
            len(tokens.image_order),
            change,
        )

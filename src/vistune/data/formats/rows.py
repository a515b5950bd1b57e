"""Where every row of a dataset file begins and ends, found in one pass without parsing it.

A JSON list is cut at its commas of the first level, JSONL at its line ends. The file is mapped, not
read: a list of a gigabyte costs 16 bytes a row, and worker processes share the mapping. What is
checked here is only the outer structure; a row that is broken inside is that row's error.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.cache import cache_folder, file_mark, write_once
from vistune.data.kept import Hold
from vistune.errors import DataError, RowError

_BLOCK_BYTES = 1 << 24
_BYTES_WORTH_KEEPING = 1 << 27
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_BLANKS = _SPACE.decode()
_DECODER = json.JSONDecoder()
# 1 quote, 2 opens, 3 closes, 4 comma, 5 backslash, 0 all else
_KIND = bytes(
    {34: 1, 91: 2, 123: 2, 93: 3, 125: 3, 44: 4, 92: 5}.get(byte, 0) for byte in range(256)
)


@dataclass
class JsonRows:
    """The rows of a JSON list or JSONL file, read one by one.

    Args:
        path: The file.
        starts: int64 [R]; first byte of every row.
        stops: int64 [R]; one past its last byte.
        lines: int64 [R]; line of every row, from 1 (JSONL), or None (JSON list).
    """

    path: Path
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64] | None
    _map: mmap.mmap | None = field(default=None, repr=False)
    _hold: Hold | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._name = self.path.name

    def __len__(self) -> int:
        return int(self.starts.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a spawned process maps the file itself

    def where(self, row: int) -> str:
        """Returns the place of a row for messages: "train.jsonl:18" or "train.json row 17"."""
        if self.lines is not None:
            return f"{self._name}:{int(self.lines[row])}"
        return f"{self._name} row {row}"

    def parse(self, row: int) -> Any:
        """Returns the parsed row.

        Raises:
            RowError: Its bytes are not UTF-8, or not JSON.
        """
        if self._map is None:
            self._map = _map_file(self.path)
        raw = self._map[int(self.starts[row]) : int(self.stops[row])]
        try:
            text = raw.decode("utf-8").strip(_BLANKS)
            content, end = _DECODER.raw_decode(text)  # `json.loads` less its own overhead
            if end != len(text):
                raise json.JSONDecodeError("Extra data", text, end)
            if b"\\ud" in raw or b"\\uD" in raw:  # half a character cannot be tokenised
                json.dumps(content, ensure_ascii=False).encode("utf-8")
            return content
        except UnicodeEncodeError as error:
            raise RowError(
                "the text holds half a character (a lone surrogate escape)",
                reason="broken_text",
                where=self.where(row),
                fix="mend or drop the row",
            ) from error
        except UnicodeDecodeError as error:
            raise RowError(
                f"byte {error.start} of the row is not UTF-8",
                reason="not_utf8",
                where=self.where(row),
                fix="save the file as UTF-8",
            ) from error
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"the row is not JSON: {error}",
                reason="broken_json",
                where=self.where(row),
                fix="mend or drop the row",
            ) from error


def index_rows(path: Path, *, max_rows: int | None = None) -> JsonRows:
    """Finds the rows of a dataset file.

    Args:
        path: A JSON list or JSONL file; which of the two is seen from its first character.
        max_rows: Stop after this many.

    Raises:
        DataError: The file is missing, empty, or its outer structure is broken.
    """
    if not path.is_file():
        raise DataError(
            "the dataset file is not there",
            where=str(path),
            got="a folder" if path.is_dir() else "nothing",
            fix="check data.train[].path",
        )
    if path.stat().st_size == 0:
        raise DataError(
            "the dataset file is empty", where=str(path), fix="fetch or write the file again"
        )
    if path.stat().st_size >= _BYTES_WORTH_KEEPING:
        return _kept_rows(path, max_rows)
    return _found_rows(path, max_rows)


def _kept_rows(path: Path, max_rows: int | None) -> JsonRows:
    """Returns the rows of a large file, whose places are kept from one start to the next."""
    mark = json.dumps([os.path.realpath(path), *file_mark(path), max_rows])
    name = hashlib.blake2b(mark.encode(), digest_size=12).hexdigest()
    file = cache_folder("rows") / f"{name}.npy"
    try:
        hold = Hold(file)
        places = np.load(file, mmap_mode="r")
    except (OSError, ValueError):
        file.unlink(missing_ok=True)
        found = _found_rows(path, max_rows)
        columns = [found.starts, found.stops]
        if found.lines is not None:
            columns.append(found.lines)
        write_once(file, lambda out: np.save(out, np.stack(columns)))
        return found
    lines = places[2] if len(places) > 2 else None
    return JsonRows(path, places[0], places[1], lines, _hold=hold)


def _found_rows(path: Path, max_rows: int | None) -> JsonRows:
    data = _map_file(path)
    begin = 3 if data[:3] == _BOM else 0
    while begin < len(data) and data[begin : begin + 1] in (b" ", b"\t", b"\r", b"\n"):
        begin += 1
    first = data[begin : begin + 1]
    if first == b"[":
        starts, stops = _list_rows(data, begin, path=path, max_rows=max_rows)
        return JsonRows(path, starts, stops, None, data)
    if first == b"{":
        starts, stops, lines = _line_rows(data, begin, max_rows=max_rows)
        rows = JsonRows(path, starts, stops, lines, data)
        if lines.size > 1 and data[int(starts[0]) : int(stops[0])].rstrip() == b"{":
            raise DataError(
                "the file holds one JSON object over several lines",
                where=str(path),
                expected="a JSON list of rows, or one JSON object a line",
            )
        return rows
    raise DataError(
        "the dataset file is neither a JSON list nor JSONL",
        where=str(path),
        got=repr(first.decode("latin-1")) if first else "only blanks",
        expected="'[' or '{' as the first character",
    )


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_rows(
    data: mmap.mmap, begin: int, *, max_rows: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    line = 1 + bytes(data[:begin]).count(b"\n")
    breaks: list[npt.NDArray[np.int64]] = []
    found = 0
    for offset in range(begin, len(data), _BLOCK_BYTES):
        block = np.frombuffer(data, dtype=np.uint8, offset=offset, count=_count(data, offset))
        at = np.flatnonzero(block == 10).astype(np.int64) + offset
        breaks.append(at)
        found += at.size
        if max_rows is not None and found > 2 * max_rows:
            break
    ends = np.concatenate([*breaks, np.array([len(data)], dtype=np.int64)])
    if max_rows is not None and ends.size > max_rows * 2:
        ends = ends[:-1]
    starts = np.concatenate([np.array([begin], dtype=np.int64), ends[:-1] + 1])
    lines = np.arange(starts.size, dtype=np.int64) + line
    # Blank lines are no rows; only short lines can be blank.
    keep = ends > starts
    for index in np.flatnonzero(keep & (ends - starts < 64)):
        keep[index] = bool(data[int(starts[index]) : int(ends[index])].strip(_SPACE))
    starts, ends, lines = starts[keep][:max_rows], ends[keep][:max_rows], lines[keep][:max_rows]
    return starts, ends, lines


def _count(data: mmap.mmap, offset: int) -> int:
    return min(_BLOCK_BYTES, len(data) - offset)


def _list_rows(
    data: mmap.mmap, begin: int, *, path: Path, max_rows: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    cuts: list[npt.NDArray[np.int64]] = []
    in_string, depth, found, close = False, 0, 0, -1
    offset = begin
    while offset < len(data) and close < 0:
        count = _whole_block(data, offset)
        at, kind = _structure(data[offset : offset + count])
        quotes = kind == 1
        # Before the k-th mark, an odd number of quotes means that it lies inside a string.
        inside = (np.cumsum(quotes) - quotes + in_string) % 2 == 1
        live = ~quotes & ~inside
        at, kind = at[live].astype(np.int64) + offset, kind[live]
        in_string = bool((int(quotes.sum()) + in_string) % 2)
        step = np.where(kind == 2, 1, np.where(kind == 3, -1, 0))
        level = np.cumsum(step) + depth
        if level.size:
            depth = int(level[-1])
            closing = np.flatnonzero(level <= 0)
            if closing.size:
                close = int(at[closing[0]])
                at, kind, level = at[: closing[0]], kind[: closing[0]], level[: closing[0]]
            cuts.append(at[(kind == 4) & (level == 1)])
            found += cuts[-1].size
        offset += count
        if max_rows is not None and found >= max_rows:
            break
    commas = np.concatenate(cuts) if cuts else np.zeros(0, dtype=np.int64)
    if max_rows is not None and commas.size >= max_rows:
        edges = np.concatenate([[begin], commas[:max_rows]]).astype(np.int64)
        return edges[:-1] + 1, edges[1:]
    if close < 0:
        raise _broken(
            data, path, len(data), "the list is not closed: a ']', '}' or '\"' is missing"
        )
    _check_behind(data, path, close)
    if not commas.size and not data[begin + 1 : close].strip(_SPACE):
        raise DataError("the dataset file holds an empty list", where=str(path))
    edges = np.concatenate([[begin], commas, [close]]).astype(np.int64)
    return edges[:-1] + 1, edges[1:]


def _whole_block(data: mmap.mmap, offset: int) -> int:
    # A block never ends in a run of backslashes, so that every escape is seen whole.
    count = _count(data, offset)
    while offset + count < len(data) and data[offset + count - 1] == 0x5C:
        count += 1
    return count


def _structure(block: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Returns place and kind of every mark, escaped quotes left out."""
    marks = np.frombuffer(block.translate(_KIND), dtype=np.uint8)
    at = np.flatnonzero(marks != 0)
    kind = marks[at]
    slashes = np.flatnonzero(kind == 5)
    if slashes.size:
        place = at[slashes]
        ends_run = np.diff(place) != 1
        number = np.arange(place.size)
        first = np.concatenate([[True], ends_run])
        in_run = number - np.maximum.accumulate(np.where(first, number, 0))
        last = np.concatenate([ends_run, [True]])
        escaped = np.zeros(len(block) + 1, dtype=np.bool_)
        escaped[place[last & (in_run % 2 == 0)] + 1] = True  # behind an odd number of backslashes
        keep = (kind != 5) & ~escaped[at]
        at, kind = at[keep], kind[keep]
    return at, kind


def _check_behind(data: mmap.mmap, path: Path, close: int) -> None:
    if data[close : close + 1] != b"]":
        raise _broken(data, path, close, "the list is closed by '}' instead of ']'")
    rest = data[close + 1 : close + 4096].lstrip(_SPACE)
    if rest:
        raise _broken(data, path, close + 1, "there is text behind the end of the list")


def _broken(data: mmap.mmap, path: Path, at: int, what: str) -> DataError:
    line, start = 1, 0
    for offset in range(0, at, _BLOCK_BYTES):
        piece = bytes(data[offset : min(offset + _BLOCK_BYTES, at)])
        line += piece.count(b"\n")
        if b"\n" in piece:
            start = offset + piece.rindex(b"\n") + 1
    return DataError(
        f"the JSON list is broken: {what}",
        where=f"{path}:{line}:{at - start + 1}",
        fix="mend the file, or write it as JSONL (one row a line): then a broken row stays alone",
    )

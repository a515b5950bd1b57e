"""Image names and captions in a CSV file with a header.

    file_name,text
    cats/0001.jpg,"A cat, on a mat."

The image's column is called `image`, `file_name`, `path` or `img`; the caption's `caption`, `text`
or `label`. `id` and `question` are read where they stand; without a question, a caption answers
`captions.CAPTION_QUESTION`. Columns are cut at commas, or at tabs where the header has those.
Rows are found by one pass over the bytes: a line break between quotes does not end a row.
"""

from __future__ import annotations

import csv
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.formats.base import row_id, source_name
from vistune.data.formats.captions import CAPTION_QUESTION, captioned
from vistune.data.formats.row_images import RowImages
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample

_BLOCK_BYTES = 1 << 24
_IMAGE = ("image", "file_name", "path", "img")
_CAPTION = ("caption", "text", "label")


class CaptionsCsvReader:
    """Reads the rows of a CSV file by number.

    Args:
        config: The source.

    Raises:
        DataError: The file is missing, or its header does not name the columns.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name = source_name(config)
        self._path = Path(config.path)
        if not self._path.is_file() or not self._path.stat().st_size:
            raise DataError(
                "the dataset file is not there, or empty",
                where=str(self._path),
                fix="check data.train[].path",
            )
        self._map: mmap.mmap | None = None
        starts, self._lines = _find(self._bytes())
        self._edges = starts
        head = self._bytes()[: int(starts[1])].removeprefix(b"\xef\xbb\xbf")
        self._delimiter = "\t" if b"\t" in head else ","
        try:
            self._columns = [name.strip() for name in self._cells(head)]
        except (csv.Error, UnicodeDecodeError, IndexError) as error:
            raise DataError(f"the header cannot be read: {error}", where=str(self._path)) from error
        self._image = self._column(_IMAGE)
        self._caption = self._column(_CAPTION)
        self._length = min(len(starts) - 2, config.max_rows or len(starts))
        if not self._length:
            raise DataError("the file holds a header and no row", where=str(self._path))
        self._images = RowImages(config)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a spawned process maps the file itself

    def where(self, row: int) -> str:
        """Returns the place of a row for messages: file and first line."""
        return f"{self._path.name}:{int(self._lines[row + 1])}"

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        where = self.where(row)
        try:
            values = self._values(row)
            id = row_id(values.get("id"), stem=self._path.stem, row=row)
            image = self._images.ref(values[self._image], where=where, number=0)
            question = values.get("question") or CAPTION_QUESTION
            turns, notes = captioned(values[self._caption], question=question)
        except RowError as error:
            raise error.at(where) from error
        return Sample(
            id=id, source=self.name, where=where, turns=turns, images=(image,), notes=notes
        )

    def _values(self, row: int) -> dict[str, str]:
        raw = self._bytes()[int(self._edges[row + 1]) : int(self._edges[row + 2])]
        try:
            cells = self._cells(raw)
        except UnicodeDecodeError as error:
            raise RowError(
                f"byte {error.start} of the row is not UTF-8",
                reason="not_utf8",
                fix="save the file as UTF-8",
            ) from error
        except (csv.Error, IndexError) as error:
            raise RowError(
                f"the row is no CSV: {error}", reason="broken_csv", fix="mend or drop the row"
            ) from error
        if len(cells) != len(self._columns):
            raise RowError(
                f"the row has {len(cells)} cells",
                reason="broken_csv",
                expected=f"{len(self._columns)}, as the header",
                fix="put quotes around texts that hold a comma",
            )
        return dict(zip(self._columns, cells, strict=True))

    def _cells(self, raw: bytes) -> list[str]:
        text = raw.decode("utf-8").rstrip("\r\n")
        return next(csv.reader([text], delimiter=self._delimiter, strict=True))

    def _column(self, names: tuple[str, ...]) -> str:
        found = [name for name in names if name in self._columns]
        if len(found) != 1:
            raise DataError(
                f"the header names {len(found)} of the columns {', '.join(names)}",
                where=f"{self._path}:1",
                got=", ".join(self._columns)[:200],
                expected="exactly one of them",
                fix="name the columns in the first line",
            )
        return found[0]

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


def _find(data: mmap.mmap) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the first byte of every row (and the file's end), and the line each stands on."""
    ends, lines, in_quotes, line = [], [], 0, 1
    for offset in range(0, len(data), _BLOCK_BYTES):
        block = np.frombuffer(data[offset : offset + _BLOCK_BYTES], dtype=np.uint8)
        breaks = np.flatnonzero(block == 10)
        # A quote inside quotes is written twice, so that an even number leaves the state as it is.
        quotes = np.flatnonzero(block == 34)
        inside = (np.searchsorted(quotes, breaks) + in_quotes) % 2 == 1
        ends.append(breaks[~inside] + offset + 1)
        lines.append(np.flatnonzero(~inside) + line + 1)
        in_quotes = (in_quotes + quotes.size) % 2
        line += breaks.size
    starts = np.concatenate([[0], *ends]).astype(np.int64)
    number = np.concatenate([[1], *lines]).astype(np.int64)
    if starts[-1] != len(data):
        starts = np.append(starts, len(data))
    else:
        number = number[:-1]
    # Blank lines are no rows; only short ones can be blank. The header stays.
    sizes = np.diff(starts)
    keep = np.ones(sizes.size, dtype=np.bool_)
    for index in np.flatnonzero(sizes < 3):
        keep[index] = index == 0 or bool(data[int(starts[index]) : int(starts[index + 1])].strip())
    # A blank line between two rows then belongs to the row before it, whose end is stripped.
    return np.append(starts[:-1][keep], starts[-1]), number[keep]

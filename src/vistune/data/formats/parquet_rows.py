"""The rows of Parquet files, as objects of the same shape as JSON rows.

Parquet can only be unpacked in groups of rows, so reading rows in random order from it would unpack
a group for each. Therefore a file is unpacked once, into an uncompressed Arrow file in the user's
cache folder, which is then mapped: any row is read at once, and worker processes share the mapping.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vistune.data.cache import cache_folder, write_once
from vistune.data.kept import Hold, tidy
from vistune.errors import DataError, MissingExtraError, RowError

_MAGIC = b"PAR1"
_BATCH_ROWS = 32
_POLL_S = 0.05


def is_parquet(path: Path) -> bool:
    """Returns whether a path is a Parquet file or a folder with some."""
    if path.is_dir():
        return any(is_parquet(file) for file in _files(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


class ParquetRows:
    """Rows of a Parquet file or of a folder of them, read one by one.

    Args:
        path: The file; a folder stands for all its Parquet files, in the order of their names.
        max_rows: Stop after this many.

    Raises:
        DataError: A file is broken.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, path: Path, *, max_rows: int | None = None) -> None:
        self.path = path
        files = _files(path) if path.is_dir() else [path]
        files = [file for file in files if is_parquet(file)]
        self._names = [file.name for file in files]
        held = [_unpack(file) for file in files]
        self._unpacked = [file for file, _ in held]
        self._holds = [hold for _, hold in held]
        self._starts = [0]  # first row of every batch, all files end to end
        self._batches: list[tuple[int, int]] = []  # file and batch in it
        self._file_starts: list[int] = []
        self._open: dict[int, Any] = {}
        for k in range(len(files)):
            self._file_starts.append(self._starts[-1])
            for index, number in enumerate(self._batch_rows(k)):
                self._batches.append((k, index))
                self._starts.append(self._starts[-1] + number)
        self._length = min(self._starts[-1], self._starts[-1] if max_rows is None else max_rows)
        if not self._length:
            raise DataError("the dataset file holds no row", where=str(path))

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a spawned process maps the files itself

    def where(self, row: int) -> str:
        """Returns the place of a row for messages: "train.parquet row 17"."""
        k = bisect.bisect_right(self._file_starts, row) - 1
        return f"{self._names[k]} row {row - self._file_starts[k]}"

    def parse(self, row: int) -> Any:
        """Returns the row, values as Python's.

        Raises:
            RowError: A text of it is not UTF-8.
        """
        at = bisect.bisect_right(self._starts, row) - 1
        file, index = self._batches[at]
        batch = self._reader(file).get_batch(index).slice(row - self._starts[at], 1)
        try:
            return batch.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RowError(
                f"a text of the row is not UTF-8: {error}",
                reason="not_utf8",
                where=self.where(row),
                fix="write the file anew from UTF-8",
            ) from error

    def _reader(self, file: int) -> Any:
        if file not in self._open:
            import pyarrow as pa

            self._open[file] = pa.ipc.open_file(pa.memory_map(str(self._unpacked[file])))
        return self._open[file]

    def _batch_rows(self, file: int) -> Iterator[int]:
        reader = self._reader(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index).num_rows


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix == ".parquet")


def _unpack(path: Path) -> tuple[Path, Hold]:
    """Returns the Arrow file of a Parquet file, from the cache when it is there, and its hold."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError.of("pyarrow", extra="parquet", purpose="reading Parquet") from error
    stat = path.stat()
    key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{_BATCH_ROWS}"
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

    def write(out: IO[bytes]) -> None:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH_ROWS, use_threads=False)
            first = next(batches, None)
            schema = file.schema_arrow if first is None else first.schema
            with pa.ipc.new_file(out, schema) as writer:
                for batch in itertools.chain([] if first is None else [first], batches):
                    writer.write_batch(batch)

    file = cache_folder("rows") / f"{name}.arrow"
    is_new = not file.exists()
    try:
        while True:
            try:
                hold = Hold(write_once(file, write))
            except (FileNotFoundError, BlockingIOError):
                time.sleep(_POLL_S)  # it is being removed
                continue
            if is_new:
                tidy()
            return file, hold
    except pa.ArrowException as error:
        raise DataError(
            f"the Parquet file cannot be read: {error}",
            where=str(path),
            fix="fetch or write the file again",
        ) from error

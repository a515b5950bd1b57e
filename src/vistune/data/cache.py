"""The folder for what can be made again: unpacked datasets, fetched images."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from vistune.errors import DataError

_BLOCK_BYTES, _NUM_BLOCKS = 4_096, 64


def cache_folder(kind: str, *, given: str | None = None) -> Path:
    """Returns a folder of the user's cache, made when it is not there.

    Args:
        kind: Its name ("images", "rows").
        given: Taken instead of the user's cache folder.

    Raises:
        DataError: It cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given) if given else Path(base).expanduser() / "vistune" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    return folder


def write_once(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a file whole or not at all; several processes may do so at once.

    Args:
        path: The file; kept when it is there already.
        write: Puts the content into an open file.

    Returns:
        `path`.

    Raises:
        DataError: The file cannot be written.
    """
    if path.exists():
        return path
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            write(file)
        part.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return path


def file_mark(path: Path) -> list[Any]:
    """Returns what tells a file's content from another's; of a folder, that of all its files.

    That is size, time of change and samples of the content: 64 blocks of 4 KiB from one end to the
    other.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_dir():
        return _file(path)
    marks = [[os.path.relpath(name, path), *_times(Path(name))] for name in sorted(_files(path))]
    return [len(marks), hashlib.blake2b(repr(marks).encode(), digest_size=16).hexdigest()]


def _files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in names)  # noqa: PTH118 - by the million


def _times(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _file(path: Path) -> list[Any]:
    size, changed = _times(path)
    seen = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for k in range(_NUM_BLOCKS):
            at = max(0, size - _BLOCK_BYTES) * k // (_NUM_BLOCKS - 1)
            file.seek(at)
            seen.update(file.read(_BLOCK_BYTES))
            if size <= _BLOCK_BYTES:
                break
    return [size, changed, seen.hexdigest()]


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written: {error}",
        where=str(path),
        fix="make room there, or name another folder in the environment variable XDG_CACHE_HOME",
    )

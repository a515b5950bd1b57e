"""The folder for what can be made again: unpacked datasets, fetched images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from vistune.errors import DataError


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


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written: {error}",
        where=str(path),
        fix="make room there, or name another folder in the environment variable XDG_CACHE_HOME",
    )

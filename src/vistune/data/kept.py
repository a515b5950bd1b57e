"""What the cache holds, and how it stays small: nothing that a process has open is ever removed.

A process that uses something of the cache holds a shared lock on it for as long as it is mapped
(the kernel drops it with the process, however that ends); what cannot be locked alone is in use.
What nobody used for a month is removed when something new is kept, and the longest unused first
where all together are more than 64 GiB; what was used within a day always stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vistune.data.cache import cache_folder

KINDS = ("rows", "index", "plans", "images")
"""What is kept: unpacked datasets and places of rows, indexes, orders of epochs, fetched images."""
MAX_BYTES = 64 << 30
MAX_AGE_S = 30 * 86_400.0
FRESH_S = 86_400.0
_META = "meta.json"
_TRASH = "trash-"
_UNFINISHED = ("tmp", _TRASH)


class Hold:
    """Keeps a file of the cache from being removed; ends with the object.

    A copy in another process does not hold it: the process it came from does.

    Args:
        path: The file.

    Raises:
        OSError: It is not there, or is being removed.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = path.open("rb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        except OSError:
            pass  # a file system without locks: age alone protects it there
        if not path.exists():
            self._file.close()
            raise FileNotFoundError(path)
        with contextlib.suppress(OSError):  # somebody else's cache, read only
            os.utime(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": None}


@dataclass(frozen=True)
class Kept:
    """One thing in the cache.

    Args:
        kind: One of `KINDS`.
        path: The file or folder.
        num_bytes: Its size on disk.
        used_s: When it was last opened, as seconds since 1970.
    """

    kind: str
    path: Path
    num_bytes: int
    used_s: float

    @property
    def _lock(self) -> Path:
        return self.path / _META if self.path.is_dir() else self.path

    def is_held(self) -> bool:
        """Says whether a running process uses it."""
        try:
            with self._locked():
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def remove(self) -> bool:
        """Removes it unless a process uses it; returns whether it is gone."""
        try:
            with self._locked():
                if not self.path.is_dir():
                    self.path.unlink(missing_ok=True)
                    return True
                # First out of sight, whole: nobody may open half of it.
                trash = self.path.with_name(f"{_TRASH}{os.getpid()}-{self.path.name}")
                self.path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            if self.path.is_dir():  # without its lock file: never finished
                shutil.rmtree(self.path, ignore_errors=True)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def discard(folder: Path) -> None:
    """Takes a folder of the cache out of sight; it goes when no process uses it any more.

    Args:
        folder: The folder; nothing is done where it is not there.
    """
    trash = folder.with_name(f"{_TRASH}{os.getpid()}-{time.monotonic_ns()}-{folder.name}")
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return
    Kept("index", trash, 0, 0.0).remove()


def kept(kinds: Sequence[str] = KINDS) -> list[Kept]:
    """Returns what is in the cache, the longest unused first.

    Args:
        kinds: Some of `KINDS`.
    """
    found = [_kept(kind, entry) for kind in kinds for entry in _entries(kind)]
    return sorted((one for one in found if one is not None), key=lambda one: one.used_s)


def _entries(kind: str) -> Iterator[os.DirEntry[str]]:
    for entry in os.scandir(cache_folder(kind)):
        if kind == "images" and entry.is_dir():  # they lie in 256 folders
            yield from os.scandir(entry)
        else:
            yield entry


def _kept(kind: str, entry: os.DirEntry[str]) -> Kept | None:
    path = Path(entry.path)
    try:
        if not entry.is_dir():
            status = entry.stat()
            # Images are read, not mapped; most file systems note that, once a day.
            read_s = status.st_atime if kind == "images" else 0.0
            return Kept(kind, path, status.st_size, max(status.st_mtime, read_s))
        sizes = [file.stat() for file in path.rglob("*") if file.is_file()]
        lock = path / _META
        used_s = (lock if lock.is_file() else path).stat().st_mtime
        # A build that goes on touches its claims.
        newest_s = max([used_s, *(status.st_mtime for status in sizes)]) if sizes else used_s
        unfinished = entry.name.startswith(_UNFINISHED) or entry.name.endswith(".parts")
        number = sum(status.st_size for status in sizes)
        return Kept(kind, path, number, newest_s if unfinished else used_s)
    except FileNotFoundError:  # it was removed meanwhile
        return None


def tidy(*, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S) -> list[Kept]:
    """Removes what was not used for long, and the longest unused while there is too much.

    Args:
        max_bytes: Most bytes that all together may have.
        max_age_s: Longest time without use.

    Returns:
        What was removed.
    """
    now_s = time.time()
    found = kept()
    total = sum(one.num_bytes for one in found)
    removed = []
    for one in found:
        age_s = now_s - one.used_s
        is_wanted = age_s < FRESH_S or (age_s < max_age_s and total <= max_bytes)
        if is_wanted and not one.path.name.startswith(_TRASH):
            continue
        if one.remove():
            removed.append(one)
            total -= one.num_bytes
    return removed


__all__ = ["KINDS", "Hold", "Kept", "discard", "kept", "tidy"]

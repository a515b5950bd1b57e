"""The bytes of an image, wherever they stand: a file, a part of one, or memory."""

from __future__ import annotations

import io
import os
import stat
from typing import IO

from vistune.errors import ImageError
from vistune.types import ImageRef


def require_file(image: ImageRef) -> None:
    """Refuses what cannot be opened without waiting: opening a pipe waits for ever, a device may.

    Args:
        image: The image; nothing is said when it is not there.

    Raises:
        ImageError: It is a pipe, a device or a socket.
    """
    try:
        mode = image.path.stat().st_mode
    except (OSError, ValueError):
        return  # opening it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ImageError(
            "this is a pipe, a device or a socket, not an image",
            reason="image_unreadable",
            where=image.name,
            fix="replace the file",
        )


def open_bytes(ref: ImageRef) -> IO[bytes]:
    """Returns an open file that holds the image and nothing else.

    Args:
        ref: The image.

    Raises:
        OSError: The file cannot be opened.
    """
    if ref.content is not None:
        return io.BytesIO(ref.content)
    if ref.span is None:
        return ref.path.open("rb")
    return io.BufferedReader(_Slice(ref))


def read_bytes(ref: ImageRef) -> bytes:
    """Returns the image file.

    Args:
        ref: The image.

    Raises:
        OSError: It cannot be read.
    """
    if ref.content is not None:
        return ref.content
    with open_bytes(ref) as file:
        return file.read()


class _Slice(io.RawIOBase):
    """A span of a file, read as a file of its own."""

    def __init__(self, ref: ImageRef) -> None:
        assert ref.span is not None
        self._start, size = ref.span
        self._file = ref.path.open("rb", buffering=0)
        self._size = max(0, min(size, os.fstat(self._file.fileno()).st_size - self._start))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        want = max(0, min(len(buffer), self._size - self._at))
        if not want:
            return 0
        self._file.seek(self._start + self._at)
        number = self._file.readinto(memoryview(buffer)[:want]) or 0
        self._at += number
        return number

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

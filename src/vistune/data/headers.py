"""Sizes of common image files from their first bytes, several times as fast as opening them.

Only what is plain is answered: a whole JPEG or PNG without orientation, frames or anything else
that needs a look. For all others the answer is None, and `image.probe` decides; so this never
accepts a file that `probe` would refuse, nor says another size.
"""

from __future__ import annotations

import os
import zlib

from vistune.data.image import ImagePlan, probe
from vistune.data.image_file import require_file
from vistune.types import ImageRef

_HEAD_BYTES = 4_096
_TAIL_BYTES = 16
_MAX_KNOWN = 100_000
# JPEG segments that only have to be passed over: tables, comments, colour profiles, JFIF, and the
# makers' own (APP3 to APP12, APP15). Not APP1 (EXIF), APP2 (may hold further frames), APP13, APP14.
_PASSED = frozenset({0xC4, 0xDB, 0xDD, 0xE0, 0xFE, *range(0xE3, 0xED), 0xEF})
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_SIZES = {b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"tIME": 7}
_PNG_DEPTHS = {0: (1, 2, 4, 8), 2: (8,), 3: (1, 2, 4, 8)}


def plain_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Returns (height, width) of a plain JPEG or PNG file, or None for anything else."""
    try:
        # Without waiting: a pipe that stands in a folder has no writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        head = os.pread(file, _HEAD_BYTES, 0)
        if head[:3] == b"\xff\xd8\xff":
            found, end = _jpeg_size(head), b"\xff\xd9"
        elif head[:8] == _PNG:
            found, end = _png_size(head), b"IEND"
        else:
            return None
        if found is None:
            return None
        tail = os.pread(file, _TAIL_BYTES, max(0, os.fstat(file).st_size - _TAIL_BYTES))
        return found if end in tail else None
    except OSError:
        return None
    finally:
        os.close(file)


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at, size = 2, None
    while at + 4 <= len(head):
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        length = head[at + 2] << 8 | head[at + 3]
        if marker == 0xDA:
            return size if length >= 2 and at + 2 + length <= len(head) else None
        if marker in _FRAMES:
            # 8 bits a channel; grey, YCbCr or the like
            if size is not None or length < 8 or at + 10 > len(head) or head[at + 4] != 8:
                return None
            channels = head[at + 9]
            if channels not in (1, 3) or length != 8 + 3 * channels:
                return None
            height = head[at + 5] << 8 | head[at + 6]
            width = head[at + 7] << 8 | head[at + 8]
            if not height or not width:
                return None
            size = height, width
        elif marker == 0xDB:
            # whole tables of 8 bits
            if (length - 2) % 65 or any(head[k] > 15 for k in range(at + 4, at + 2 + length, 65)):
                return None
        elif marker not in _PASSED or length < 2:
            return None
        at += 2 + length
        if at >= len(head):
            return None
    return None


def _png_size(head: bytes) -> tuple[int, int] | None:
    at, size = 8, None
    while at + 12 <= len(head):
        length, kind = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        if kind == b"IDAT":
            return size
        content = head[at + 8 : at + 8 + length]
        check = head[at + 8 + length : at + 12 + length]
        if len(check) < 4 or int.from_bytes(check, "big") != zlib.crc32(kind + content):
            return None
        if kind == b"IHDR" and size is None and length == 13:
            depth, colour, rest = content[8], content[9], content[10:]
            width, height = (int.from_bytes(content[k : k + 4], "big") for k in (0, 4))
            if depth not in _PNG_DEPTHS.get(colour, ()) or rest[:2] != b"\0\0" or rest[2] > 1:
                return None
            if not 0 < width < 1 << 31 or not 0 < height < 1 << 31:
                return None
            size = height, width
        elif _PNG_SIZES.get(kind) != length and not (kind == b"PLTE" and length % 3 == 0):
            return None
        at += 12 + length
    return None


class Sizes:
    """Sizes of one source's images under one plan; a file that several rows name is read once.

    Args:
        plan: Carries the limit on the number of pixels.
    """

    def __init__(self, plan: ImagePlan) -> None:
        self._plan = plan
        self._known: dict[str, tuple[int, int]] = {}  # by name: paths are slow to hash

    def of(self, image: ImageRef) -> tuple[int, int]:
        """Returns (height, width) of an image.

        Raises:
            ImageError: As `image.probe`.
        """
        if image.span is not None or image.content is not None:
            return probe(image, self._plan)
        size = self._known.get(image.name)
        if size is not None:
            return size
        size = plain_size(image.path)
        if size is None:
            require_file(image)
            size = probe(image, self._plan)
        else:
            self._plan.check_size(*size, name=image.name)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[image.name] = size
        return size

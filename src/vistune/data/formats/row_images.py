"""The images that a row names: files of a folder, bytes in the row, or addresses on the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vistune.data.formats.base import ImageFolder, image_folder
from vistune.data.urls import UrlImages
from vistune.errors import RowError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """An image that stands in its row.

    Args:
        content: The image file.
        name: What the row calls it; empty when it has no name.
    """

    content: bytes
    name: str = ""


ImageName: TypeAlias = str | EmbeddedImage


class RowImages:
    """Turns what rows name into images.

    Args:
        config: The source: its folder, and whether it may name addresses.
        absolute: Names may be absolute, if they lie inside the folder.

    Raises:
        DataError: The image folder is not there.
    """

    def __init__(self, config: SourceConfig, *, absolute: bool = False) -> None:
        self._path = Path(config.path)
        self._folder: ImageFolder = image_folder(config)
        self._urls = None if config.urls is None else UrlImages(config.urls)
        self._absolute = absolute

    def ref(self, image: ImageName, *, where: str, number: int) -> ImageRef:
        """Returns an image; an address is fetched unless it was before.

        Args:
            image: What the row names.
            where: The row, for the name of an image that has none.
            number: Which of the row's images, from 0.

        Raises:
            RowError: It must not be read, or cannot be fetched.
        """
        if isinstance(image, EmbeddedImage):
            name = image.name or f"{where} image {number}"
            return ImageRef(path=self._path, name=name, content=image.content)
        if self._urls is not None and _ADDRESS.match(image):
            return ImageRef(path=self._urls.fetch(image), name=image)
        return self._folder.ref(image, absolute=self._absolute)


def image_names(value: Any, *, key: str = "image") -> list[ImageName]:
    """Returns what a row's image key holds: one image, a list, or none (null, "", []).

    An image is a name, its bytes, or an object with `bytes` and `path` (the hub's image column).

    Raises:
        RowError: It is none of these.
    """
    if value is None or value == "" or value == []:
        return []
    return [_image(item, key=key) for item in (value if isinstance(value, list) else [value])]


def _image(value: Any, *, key: str) -> ImageName:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return EmbeddedImage(value)
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, bytes):
            return EmbeddedImage(content, path if isinstance(path, str) else "")
        if content is None and isinstance(path, str):
            return path
    raise RowError(
        f"`{key}` is neither a file name nor a list of file names",
        reason="bad_image_name",
        got=repr(value)[:80],
        fix="name the image files",
    )

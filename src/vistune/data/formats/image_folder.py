"""A plain folder: images, and a text file with the caption beside each.

    <root>/cats/0001.jpg
    <root>/cats/0001.txt      A cat on a mat.

`path` is the folder; folders in it are searched too. Image and text have the same stem. What the
captions answer is `captions.CAPTION_QUESTION`. An image without a text file is an unusable row.
"""

from __future__ import annotations

import os
from pathlib import Path

from vistune.data.formats.base import ImageFolder
from vistune.data.formats.captions import captioned
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""File names that are taken for images."""


class ImageFolderReader:
    """Reads images and their captions by number, in the order of their paths.

    Args:
        config: The source.

    Raises:
        DataError: The folder is not there, or holds no image.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._root = Path(config.path)
        if not self._root.is_dir():
            raise DataError(
                "the folder of images is not there",
                where=str(self._root),
                fix="name the folder as data.train[].path",
            )
        if config.images is not None:
            raise DataError(
                "an image folder is its own folder of images",
                where="data.train[].images",
                got=config.images,
                fix="leave data.train[].images out",
            )
        self.name = config.name or self._root.resolve().name
        self._images = ImageFolder(self._root)
        self._names = _find(self._root)[: config.max_rows]
        if not self._names:
            raise DataError(
                "the folder holds no image",
                where=str(self._root),
                expected="names that end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
            )

    def __len__(self) -> int:
        return len(self._names)

    def where(self, row: int) -> str:
        """Returns the place of a row for messages."""
        return f"{self.name}/{self._names[row]}"

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        where, name = self.where(row), self._names[row]
        try:
            image = self._images.ref(name)
            turns, notes = captioned(_caption(image.path.with_suffix(".txt")))
        except RowError as error:
            raise error.at(where) from error
        return Sample(
            id=os.path.splitext(name)[0],  # noqa: PTH122 - keeps the separators of `name`
            source=self.name,
            where=where,
            turns=turns,
            images=(image,),
            notes=notes,
        )


def _find(root: Path) -> list[str]:
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        prefix = os.path.relpath(folder, root)
        found += [
            name if prefix == "." else f"{prefix}/{name}"
            for name in files
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _caption(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError as error:
        raise RowError(
            "the image has no text file",
            reason="caption_missing",
            expected=path.name,
            fix="write its caption there, or remove the image",
        ) from error
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte {error.start} of {path.name} is not UTF-8",
            reason="not_utf8",
            fix="save it as UTF-8",
        ) from error
    except OSError as error:
        raise RowError(
            f"{path.name} cannot be read: {error}", reason="caption_missing", fix="check the file"
        ) from error

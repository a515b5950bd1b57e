"""COCO's caption annotations: one row for every caption.

    {"images": [{"id": 391895, "file_name": "000000391895.jpg"}, ...],
     "annotations": [{"id": 770337, "image_id": 391895, "caption": "A man with a helmet."}, ...]}

What a caption answers is `captions.CAPTION_QUESTION`. The file is one JSON object, so it is parsed
whole once, and only names and captions of it are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vistune.data.formats.base import image_folder, source_name
from vistune.data.formats.captions import captioned
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample


class CocoCaptionsReader:
    """Reads COCO captions by number.

    Args:
        config: The source.

    Raises:
        DataError: The file cannot be read or is no caption file.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name = source_name(config)
        path = Path(config.path)
        self._file = path.name
        self._images = image_folder(config)
        content = _load(path)
        self._names: dict[Any, Any] = {
            image.get("id"): image.get("file_name")
            for image in content["images"]
            if isinstance(image, dict) and isinstance(image.get("id"), int | str)
        }
        self._rows: list[Any] = [
            (row.get("id"), row.get("image_id"), row.get("caption"))
            if isinstance(row, dict)
            else None
            for row in content["annotations"][: config.max_rows]
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        """Returns the place of a row for messages."""
        return f"{self._file} annotation {row}"

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        where = self.where(row)
        id, image_id, caption = self._rows[row] or (None, None, None)
        try:
            if not isinstance(caption, str):
                raise RowError(
                    "the annotation has no text `caption`",
                    reason="bad_turn",
                    fix="drop the annotation",
                )
            name = self._names.get(image_id) if isinstance(image_id, int | str) else None
            if not isinstance(name, str):
                raise RowError(
                    f"no image has the id {image_id!r}",
                    reason="bad_image_name",
                    fix="add the image to `images`, or drop the annotation",
                )
            images = (self._images.ref(name),)
            turns, notes = captioned(caption)
        except RowError as error:
            raise error.at(where) from error
        return Sample(
            id=str(row if id is None else id),
            source=self.name,
            where=where,
            turns=turns,
            images=images,
            notes=notes,
        )


def _load(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise DataError(
            "the dataset file is not there", where=str(path), fix="check data.train[].path"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is not JSON: {error}", where=str(path)) from error
    keys = ("images", "annotations")
    if not (isinstance(content, dict) and all(isinstance(content.get(k), list) for k in keys)):
        raise DataError(
            "this is no COCO caption file",
            where=str(path),
            expected="an object with the lists `images` and `annotations`",
            fix="check data.train[].format",
        )
    return content

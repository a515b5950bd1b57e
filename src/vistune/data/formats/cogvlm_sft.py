r"""CogVLM-SFT's format: a folder of images and a folder of labels, one JSON file an image.

    <root>/images/00012.jpg
    <root>/labels_en/00012.json
        {"conversations": [{"role": "user", "content": "Who is it?"},
                           {"role": "assistant", "content": "A cat."}]}

`path` is the folder of labels, `images` that of the images (the sibling `images` when left out).
Label and image have the same stem. The image stands in front of the first question.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vistune.data.formats.base import IMAGE_MARK, ImageFolder, conversation
from vistune.data.formats.json_rows import image_first, said_by, text_of, turn_list
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample, Speaker

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


class CogvlmSftReader:
    """Reads CogVLM-SFT labels by number, in the order of their names.

    Args:
        config: The source.

    Raises:
        DataError: A folder is not there, or holds no label.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._labels = Path(config.path)
        self.name = config.name or self._labels.name
        folder = Path(config.images) if config.images else self._labels.parent / "images"
        if not self._labels.is_dir():
            raise DataError(
                "the folder of labels is not there",
                where=str(self._labels),
                fix="name the folder with the JSON files as data.train[].path",
            )
        inside = sorted(entry.name for entry in self._labels.glob("labels_*") if entry.is_dir())
        if inside:
            raise DataError(
                "this is the folder around the labels, and each folder of labels is a source",
                where=str(self._labels),
                got=", ".join(inside),
                fix=f"name {self._labels / inside[0]} as data.train[].path",
            )
        self._images = ImageFolder(folder)
        names = sorted(entry.name for entry in folder.iterdir())
        self._images_of: dict[str, list[str]] = {}
        for name in names:
            if Path(name).suffix.lower() in _SUFFIXES:
                self._images_of.setdefault(Path(name).stem, []).append(name)
        files = sorted(e.name for e in self._labels.iterdir() if e.suffix.lower() == ".json")
        self._files = files[: config.max_rows]
        if not self._files:
            raise DataError("the folder holds no JSON file", where=str(self._labels))

    def __len__(self) -> int:
        return len(self._files)

    def where(self, row: int) -> str:
        """Returns the place of a row for messages."""
        return f"{self._labels.name}/{self._files[row]}"

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        where, stem = self.where(row), Path(self._files[row]).stem
        try:
            content = self._parse(row)
            found = self._images_of.get(stem, [])
            if not found:
                raise RowError(
                    f"no image is called {stem}",
                    reason="image_missing",
                    fix="add the image, or remove the label",
                )
            if len(found) > 1:
                raise RowError(
                    f"{len(found)} images are called {stem}",
                    reason="image_ambiguous",
                    got=", ".join(found),
                    fix="keep the one that the label is of",
                )
            images = (self._images.ref(found[0]),)
            turns, notes = conversation(turns_of(content), num_images=1)
        except RowError as error:
            raise error.at(where) from error
        return Sample(
            id=stem, source=self.name, where=where, turns=turns, images=images, notes=notes
        )

    def _parse(self, row: int) -> dict[str, Any]:
        try:
            content = json.loads((self._labels / self._files[row]).read_text(encoding="utf-8-sig"))
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a character fails here
        except UnicodeError as error:
            raise RowError(
                f"the label is not UTF-8: {error}", reason="not_utf8", fix="save it as UTF-8"
            ) from error
        except (ValueError, RecursionError, OSError) as error:
            raise RowError(
                f"the label is not JSON: {error}", reason="broken_json", fix="mend or remove it"
            ) from error
        if not isinstance(content, dict):
            raise RowError(
                "the label is not a JSON object", reason="not_an_object", fix="remove it"
            )
        return content


def turns_of(content: dict[str, Any]) -> list[tuple[Speaker, str]]:
    """Returns who says what in a label; the image stands in front of the first question."""
    turns: list[tuple[Speaker, str]] = []
    for k, turn in enumerate(turn_list(content.get("conversations"), key="conversations")):
        text = text_of(turn, "content", turn=k)
        turns.append((said_by(turn.get("role"), turn=k), text))
    for k, (speaker, text) in enumerate(turns):
        if speaker == "user":
            if not any(IMAGE_MARK in said for _, said in turns):
                turns[k] = (speaker, image_first(text))
            break
    return turns

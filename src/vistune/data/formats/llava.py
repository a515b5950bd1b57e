r"""LLaVA's format: a JSON list or JSONL of rows with `conversations`.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is on the bus?"},
                       {"from": "gpt", "value": "An advertisement."}]}

The rules, where the public code is silent or goes wrong: `image` may be one name or a list; absent,
null, "" or [] means no image. `<image>` stays where it stands, several in a turn stay several, and
their number must be that of the images. `user`, `assistant` and `system` are known beside `human`
and `gpt`. Ids may be numbers. Other keys are ignored. See `formats.base.conversation` for the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistune.data.formats.base import conversation, image_folder, row_id, source_name
from vistune.data.formats.rows import index_rows
from vistune.errors import RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample, Speaker

_SPEAKERS: dict[str, Speaker] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class LlavaReader:
    """Reads LLaVA rows by number.

    Args:
        config: The source.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name = source_name(config)
        self._stem = Path(config.path).stem
        self._rows = index_rows(Path(config.path), max_rows=config.max_rows)
        self._images = image_folder(config)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        """Returns the place of a row for messages."""
        return self._rows.where(row)

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        content = self._rows.parse(row)
        where = self._rows.where(row)
        if not isinstance(content, dict):
            raise RowError(
                "the row is not a JSON object",
                reason="not_an_object",
                where=where,
                got=type(content).__name__,
                fix="drop the row",
            )
        id = row_id(content.get("id"), stem=self._stem, row=row)
        try:
            images = tuple(self._images.ref(name) for name in image_names(content.get("image")))
            turns, notes = conversation(
                speakers_and_texts(content.get("conversations")), num_images=len(images)
            )
        except RowError as error:
            raise error.at(f"{where} (id {id})") from error
        return Sample(id=id, source=self.name, where=where, turns=turns, images=images, notes=notes)


def image_names(value: Any) -> list[str]:
    """Returns the names under a row's `image` key.

    Raises:
        RowError: It is neither a name nor a list of names.
    """
    if value is None or value == "" or value == []:
        return []
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise RowError(
                "`image` is neither a file name nor a list of file names",
                reason="bad_image_name",
                got=repr(name)[:80],
                fix="name the image files",
            )
    return list(names)


def speakers_and_texts(value: Any) -> list[tuple[Speaker, str]]:
    """Returns who said what under a row's `conversations` key.

    Raises:
        RowError: It is not a list of turns with a known `from` and a text `value`.
    """
    if not isinstance(value, list):
        raise RowError(
            "the row has no list `conversations`",
            reason="no_conversation",
            got=type(value).__name__,
            fix="check data.train[].format",
        )
    out: list[tuple[Speaker, str]] = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RowError(
                f"turn {index} has no text `value`",
                reason="bad_turn",
                got=repr(turn)[:80],
                fix='write turns as {"from": ..., "value": ...}',
            )
        role = turn.get("from")
        if not isinstance(role, str) or role not in _SPEAKERS:
            raise RowError(
                f"turn {index} is said by no known role",
                reason="unknown_role",
                got=repr(role)[:80],
                expected=", ".join(_SPEAKERS),
                fix="rename the role, or drop the row",
            )
        out.append((_SPEAKERS[role], turn["value"]))
    return out

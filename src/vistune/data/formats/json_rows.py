"""What formats of one object a row (JSON or Parquet) share, so that each is only its own rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vistune.data.formats.base import IMAGE_MARK, conversation, row_id, source_name
from vistune.data.formats.parquet_rows import ParquetRows, is_parquet
from vistune.data.formats.row_images import ImageName, RowImages, image_names
from vistune.data.formats.rows import JsonRows, index_rows
from vistune.errors import RowError
from vistune.recipe import SourceConfig
from vistune.types import Sample, Speaker

SPEAKERS: dict[str, Speaker] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Who is meant by the role names found in the field."""


class RowContent(NamedTuple):
    """A row as its format means it.

    Args:
        turns: Who says what; `<image>` stands where an image belongs.
        images: Images in the order in which they are referred to.
        id: The row's own id, as it was found.
    """

    turns: list[tuple[Speaker, str]]
    images: list[ImageName]
    id: object = None


class JsonRowReader:
    """Reads the rows of a JSON list, a JSONL file or a Parquet file by number.

    Args:
        config: The source.
        interpret: What a parsed row means in this format; raises `RowError` with no place.
        absolute_images: Image names may be absolute, if they lie inside the image folder.
    """

    def __init__(
        self,
        config: SourceConfig,
        interpret: Callable[[dict[str, Any]], RowContent],
        *,
        absolute_images: bool = False,
    ) -> None:
        self.name = source_name(config)
        self._stem = Path(config.path).stem
        self._interpret = interpret
        self._rows = open_rows(Path(config.path), max_rows=config.max_rows)
        self._images = RowImages(config, absolute=absolute_images)

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
        id: object = content.get("id")
        try:
            meant = self._interpret(content)
            id = meant.id
            images = tuple(
                self._images.ref(image, where=where, number=k)
                for k, image in enumerate(meant.images)
            )
            turns, notes = conversation(meant.turns, num_images=len(images))
        except RowError as error:
            known = row_id(id, stem=self._stem, row=row)
            raise error.at(f"{where} (id {known})") from error
        return Sample(
            id=row_id(id, stem=self._stem, row=row),
            source=self.name,
            where=where,
            turns=turns,
            images=images,
            notes=notes,
        )


def open_rows(path: Path, *, max_rows: int | None) -> JsonRows | ParquetRows:
    """Finds the rows of a dataset file; its content says how it is written, not its name.

    Args:
        path: A JSON list, JSONL or Parquet file, or a folder of Parquet files.
        max_rows: Stop after this many.

    Raises:
        DataError: It is missing, empty or broken as a whole.
        MissingExtraError: It is Parquet, and pyarrow is not installed.
    """
    if is_parquet(path):
        return ParquetRows(path, max_rows=max_rows)
    return index_rows(path, max_rows=max_rows)


def said_by(role: Any, *, turn: int) -> Speaker:
    """Returns who a role name means.

    Raises:
        RowError: It is none of the known ones.
    """
    if not isinstance(role, str) or role not in SPEAKERS:
        raise RowError(
            f"turn {turn} is said by no known role",
            reason="unknown_role",
            got=repr(role)[:80],
            expected=", ".join(SPEAKERS),
            fix="rename the role, or drop the row",
        )
    return SPEAKERS[role]


def turn_list(value: Any, *, key: str) -> list[Any]:
    """Returns the list of turns under a row's key.

    Raises:
        RowError: There is no list.
    """
    if not isinstance(value, list):
        raise RowError(
            f"the row has no list `{key}`",
            reason="no_conversation",
            got=type(value).__name__,
            fix="check data.train[].format",
        )
    return value


def text_of(row: Any, key: str, *, turn: int | None = None, default: str | None = None) -> str:
    """Returns the text under a key.

    Args:
        row: A row, or a turn of one.
        key: The key.
        turn: Number of the turn, for the message.
        default: Taken where the key is absent or null.

    Raises:
        RowError: There is no text.
    """
    value = row.get(key) if isinstance(row, dict) else None
    if value is None and default is not None and isinstance(row, dict):
        return default
    if not isinstance(value, str):
        what = "the row" if turn is None else f"turn {turn}"
        raise RowError(
            f"{what} has no text `{key}`",
            reason="bad_turn",
            got=repr(value if isinstance(row, dict) else row)[:80],
            fix=f"write a text under `{key}`, or check data.train[].format",
        )
    return value


def image_first(text: str, *, number: int = 1) -> str:
    """Returns a question with its images in front, as LLaVA writes it."""
    return f"{IMAGE_MARK}\n" * number + text


def refuse_key(row: dict[str, Any], key: str, *, unless: tuple[object, ...], why: str) -> None:
    """Refuses a row whose key asks for something that is not done, instead of ignoring it.

    Args:
        row: The row, or a turn of one.
        key: The key.
        unless: Values that ask for nothing.
        why: What the key asks for.

    Raises:
        RowError: The key holds another value.
    """
    value = row.get(key)
    if value is None or value in unless:
        return
    raise RowError(
        f"`{key}` asks for {why}, which is not supported",
        reason="unsupported_key",
        got=repr(value)[:80],
        fix=f"take `{key}` out, or drop the row",
    )


__all__ = [
    "SPEAKERS",
    "JsonRowReader",
    "RowContent",
    "image_first",
    "image_names",
    "open_rows",
    "refuse_key",
    "said_by",
    "text_of",
    "turn_list",
]

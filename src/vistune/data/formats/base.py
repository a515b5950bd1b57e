"""What every dataset format offers: rows by number, each read when it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef, Part, Sample, Speaker, Turn

IMAGE_MARK = "<image>"
"""Where an image stands in a row's text."""

_MAX_NAME_CHARS = 1_024
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class RowReader(Protocol):
    """One data source. Survives pickling, so that worker processes can hold one."""

    name: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used; says file, row, id, reason and fix.
        """

    def where(self, row: int) -> str:
        """Returns the place of a row for messages."""


RowReaderFactory: TypeAlias = Callable[[SourceConfig], RowReader]


class ImageFolder:
    """The folder that a source's images are named relative to, and may not leave.

    Args:
        folder: The folder.

    Raises:
        DataError: It is not there.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(
                "the image folder is not there",
                where=str(folder),
                fix="check data.train[].images",
            )
        self._root = os.path.realpath(folder)
        self._inside: dict[str, str] = {"": self._root}

    def ref(self, name: str, *, absolute: bool = False) -> ImageRef:
        """Returns the image of a name; nothing of it is read.

        Args:
            name: The name, relative to the folder.
            absolute: It may be absolute, if it lies inside the folder.

        Raises:
            RowError: The name leads out of the folder.
        """
        if ":" in name and _ADDRESS.match(name):
            raise RowError(
                f"{name[:80]!r} is an address or the image itself, not the name of a file",
                reason="image_is_url",
                fix="save the image as a file and name it; http(s) addresses can be allowed in"
                " data.train[].urls",
            )
        if len(name) > _MAX_NAME_CHARS:
            raise _bad_name(f"{name[:80]}...", f"has {len(name):,} characters: it is no file name")
        if not name or "\0" in name or not (name.isascii() or _is_encodable(name)):
            raise _bad_name(name, "is no file name")
        given = name
        if absolute and name.startswith(self._root + os.sep):
            name = name[len(self._root) + 1 :]
        if os.path.isabs(name):  # noqa: PTH117 - per row: pathlib is ten times slower here
            raise _outside(name, "is absolute")
        head, tail = os.path.split(name)
        if tail in ("", ".", ".."):
            raise _outside(name, "names no file")
        parent = self._inside.get(head)
        if parent is None:
            parent = self._prove(head, name)
        path = f"{parent}{os.sep}{tail}"
        if os.path.islink(path) and not self._holds(os.path.realpath(path)):  # noqa: PTH114
            raise _outside(name, "is a link that leads out")
        return ImageRef(path=Path(path), name=given)

    def _prove(self, head: str, name: str) -> str:
        real = os.path.realpath(f"{self._root}{os.sep}{head}")
        if ".." in Path(head).parts or not self._holds(real):
            raise _outside(name, "leads out")
        self._inside[head] = real
        return real

    def _holds(self, real: str) -> bool:
        root = self._root.rstrip(os.sep)
        return real == root or real.startswith(root + os.sep)


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _outside(name: str, why: str) -> RowError:
    return RowError(
        f"the image path {name!r} {why}; images must lie inside the declared folder",
        reason="image_outside_folder",
        fix="write paths relative to data.train[].images, and name the folder that really holds"
        " the files there",
    )


def _bad_name(name: str, why: str) -> RowError:
    return RowError(
        f"{name!r} {why}",
        reason="bad_image_name",
        fix="name one image file, relative to the folder",
    )


def source_name(config: SourceConfig) -> str:
    """Returns the source's name: the recipe's, or the file's stem."""
    return config.name or Path(config.path).stem


def image_folder(config: SourceConfig) -> ImageFolder:
    """Returns the source's image folder: the recipe's, or the one the file lies in."""
    return ImageFolder(Path(config.images) if config.images else Path(config.path).parent)


def row_id(value: object, *, stem: str, row: int) -> str:
    """Returns a row's id as text; numbers are written out, a missing one is `<stem>:<row>`."""
    if value is None or isinstance(value, bool | dict | list) or value == "":
        return f"{stem}:{row}"
    return str(value)


def split_images(text: str, *, first: int) -> tuple[tuple[Part, ...], int]:
    """Cuts a text at every `<image>`.

    Args:
        text: The text of a turn.
        first: Index of the first image in it.

    Returns:
        Text and image indices in reading order, and the number of images.
    """
    if IMAGE_MARK not in text:
        return ((text,) if text else ()), 0
    pieces = text.split(IMAGE_MARK)
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append(first + index - 1)
        if piece:
            parts.append(piece)
    return tuple(parts), len(pieces) - 1


def conversation(
    turns: list[tuple[Speaker, str]], *, num_images: int
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Builds the turns of a sample from who said what, under the rules all formats share.

    The rules: answers in front of the first question are dropped (and noted). A system turn may
    only stand first. Users and answers must alternate and end with an answer. No answer may be
    blank. `<image>` stands only in a user's turn, as often as there are images.

    Args:
        turns: Speaker and text in order.
        num_images: Images that the row names.

    Returns:
        The turns, and the notes of what was changed.

    Raises:
        RowError: A rule is broken.
    """
    notes: list[str] = []
    system = turns[:1] if turns and turns[0][0] == "system" else []
    rest = turns[len(system) :]
    while rest and rest[0][0] == "assistant":
        rest = rest[1:]
        notes = ["leading_answer_dropped"]
    _check_turns(rest)
    out: list[Turn] = []
    seen = 0
    for speaker, text in [*system, *rest]:
        if IMAGE_MARK not in text:
            out.append(Turn(speaker, (text,) if text else ()))
            continue
        if speaker != "user":
            who = "an answer" if speaker == "assistant" else "a system prompt"
            raise RowError(
                f"{IMAGE_MARK} stands in {who}",
                reason="image_token_in_answer"
                if speaker == "assistant"
                else "image_in_system_turn",
                fix=f"take {IMAGE_MARK} out of it",
            )
        parts, number = split_images(text, first=seen)
        seen += number
        out.append(Turn(speaker, parts))
    _check_images(seen, num_images)
    return tuple(out), tuple(notes)


def _check_turns(turns: list[tuple[Speaker, str]]) -> None:
    if not turns:
        raise RowError(
            "the conversation has no question", reason="empty_conversation", fix="drop the row"
        )
    speakers = [speaker for speaker, _ in turns]
    if speakers == ["user", "assistant"] * (len(turns) // 2) and all(
        text and not text.isspace() for _, text in turns[1::2]
    ):
        return
    for index, (speaker, text) in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if speaker != expected:
            raise RowError(
                f"turn {index} is not the {expected}'s",
                reason="roles_not_alternating",
                got=speaker,
                expected=expected,
                fix="merge neighbouring turns of one speaker, or drop the row",
            )
        if speaker == "assistant" and not text.strip():
            raise RowError(
                f"the answer of turn {index} is blank",
                reason="empty_answer",
                fix="give it an answer, or drop the turn",
            )
    if len(turns) % 2:
        raise RowError(
            "the last question has no answer",
            reason="last_turn_unanswered",
            fix="give it an answer, or drop the turn",
        )


def _check_images(seen: int, num_images: int) -> None:
    if seen == num_images:
        return
    if not num_images:
        reason, fix = "image_key_missing", f"name the image, or take {IMAGE_MARK} out of the text"
    elif not seen:
        reason, fix = "image_not_in_text", f"put {IMAGE_MARK} where the image belongs in the text"
    else:
        reason, fix = "image_count_mismatch", f"write one {IMAGE_MARK} for every image"
    raise RowError(
        f"the row names {num_images} image(s), and {IMAGE_MARK} stands {seen} time(s) in its text",
        reason=reason,
        fix=fix,
    )

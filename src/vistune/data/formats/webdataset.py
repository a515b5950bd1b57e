r"""WebDataset: tar files in which members of one name, endings aside, are one row.

    shard-000.tar: 0001.jpg 0001.txt 0002.jpg 0002.json ...

`path` is a tar file, a folder whose `.tar` files are the shards, or shards with wildcards
(`train-*.tar`, `train-{000..127}.tar`). The key of a row is the
member's path up to the first dot of its file name; what follows is the ending. Members of one row
stand together. A row is

- its image members, in the order of the archive, and
- `txt`: a caption (it answers `captions.CAPTION_QUESTION`), or
- `json`: an object with `messages` (as the format of that name) or `conversations` (as ShareGPT's
  and LLaVA's). Images it names must be members of the row, by file name or ending; where it names
  none, the image members are taken.

Other members are left alone. Archives are read in place, not unpacked: one pass notes where the
members stand. A compressed archive has no such places and is refused.
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vistune.data.formats import messages, sharegpt
from vistune.data.formats.base import conversation, row_id
from vistune.data.formats.captions import captioned
from vistune.data.formats.image_folder import IMAGE_SUFFIXES
from vistune.data.formats.json_rows import RowContent
from vistune.data.formats.paths import files_of
from vistune.data.image_file import read_bytes
from vistune.errors import DataError, RowError
from vistune.recipe import SourceConfig
from vistune.types import ImageRef, Sample, Turn


@dataclass(frozen=True, slots=True)
class _Member:
    """One file of a row."""

    name: str
    ending: str
    ref: ImageRef

    @property
    def is_image(self) -> bool:
        return f".{self.ending.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


class WebDatasetReader:
    """Reads the rows of tar shards by number.

    Args:
        config: The source.

    Raises:
        DataError: A shard is missing or is no plain tar file, or no row is found.
    """

    def __init__(self, config: SourceConfig) -> None:
        root = Path(config.path)
        if config.images is not None:
            raise DataError(
                "a WebDataset holds its images itself",
                where="data.train[].images",
                got=config.images,
                fix="leave data.train[].images out",
            )
        self.name = config.name or root.stem
        self._shards = [path.resolve() for path in _shards(config.path)]
        # Flat arrays: a million rows cost no Python object each, and forked workers share them.
        self._names = bytearray()
        self._name_ends = array("q", [0])
        self._offsets, self._sizes, self._owners = array("q"), array("q"), array("l")
        self._first = array("q")
        for shard, path in enumerate(self._shards):
            last = None
            for key, name, offset, size in _members(path):
                if key != last:
                    if len(self._first) == config.max_rows:
                        break
                    self._first.append(len(self._sizes))
                    last = key
                self._names += name.encode("utf-8", "surrogateescape")
                self._name_ends.append(len(self._names))
                self._offsets.append(offset)
                self._sizes.append(size)
                self._owners.append(shard)
        if not self._first:
            raise DataError("the archive holds no row", where=str(root))
        self._first.append(len(self._sizes))

    def __len__(self) -> int:
        return len(self._first) - 1

    def where(self, row: int) -> str:
        """Returns the place of a row for messages: shard and key."""
        first = self._first[row]
        return f"{self._shards[self._owners[first]].name}/{_key(self._name(first))}"

    def read(self, row: int) -> Sample:
        """Returns a row.

        Raises:
            RowError: It cannot be used.
        """
        where = self.where(row)
        id = where.partition("/")[2]
        try:
            members = [self._member(k) for k in range(self._first[row], self._first[row + 1])]
            images, turns, notes, own = _meaning(members)
        except RowError as error:
            raise error.at(where) from error
        return Sample(
            id=id if own is None else row_id(own, stem=id, row=row),
            source=self.name,
            where=where,
            turns=turns,
            images=images,
            notes=notes,
        )

    def _name(self, member: int) -> str:
        raw = self._names[self._name_ends[member] : self._name_ends[member + 1]]
        return raw.decode("utf-8", "surrogateescape")

    def _member(self, index: int) -> _Member:
        name, shard = self._name(index), self._shards[self._owners[index]]
        ref = ImageRef(
            path=shard,
            name=f"{shard.name}/{name}",
            span=(self._offsets[index], self._sizes[index]),
        )
        file_name = PurePosixPath(name).name
        return _Member(file_name, file_name.partition(".")[2], ref)


def _meaning(
    members: list[_Member],
) -> tuple[tuple[ImageRef, ...], tuple[Turn, ...], tuple[str, ...], object]:
    """Returns images, turns, notes and the row's own id."""
    images = [member for member in members if member.is_image]
    texts = [member for member in members if member.ending in ("txt", "json")]
    if len(texts) != 1:
        raise RowError(
            f"the row has {len(texts)} members that end in txt or json",
            reason="caption_missing" if not texts else "several_texts",
            got=", ".join(member.name for member in members)[:120],
            expected="one",
            fix="give every row one text member",
        )
    if texts[0].ending == "txt":
        if len(images) != 1:
            raise RowError(
                f"the row has a caption and {len(images)} images",
                reason="image_count_mismatch",
                fix="give it one image, or a conversation in a json member",
            )
        turns, notes = captioned(_text(texts[0]).strip())
        return (images[0].ref,), turns, notes, None
    meant = conversation_of(_text(texts[0]))
    found = [_named(name, images) for name in meant.images] if meant.images else images
    turns, notes = conversation(meant.turns, num_images=len(found))
    return tuple(member.ref for member in found), turns, notes, meant.id


def conversation_of(text: str) -> RowContent:
    """Returns what a json member means.

    Raises:
        RowError: It is no conversation.
    """
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a character fails here
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"the json member is not JSON: {error}", reason="broken_json", fix="mend the row"
        ) from error
    if isinstance(content, dict) and "messages" in content:
        return messages.interpret(content)
    if isinstance(content, dict) and "conversations" in content:
        return sharegpt.interpret(content)
    raise RowError(
        "the json member holds neither `messages` nor `conversations`",
        reason="no_conversation",
        fix="write one of the two",
    )


def _named(name: Any, images: list[_Member]) -> _Member:
    wanted = PurePosixPath(name).name if isinstance(name, str) else ""
    for member in images:
        if wanted in (member.name, member.ending):
            return member
    raise RowError(
        f"the image {wanted!r} is no member of the row",
        reason="image_missing",
        got=", ".join(member.name for member in images)[:120] or "no image",
        fix="put it beside the json member, under the same key",
    )


def _text(member: _Member) -> str:
    try:
        return read_bytes(member.ref).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte {error.start} of {member.name} is not UTF-8",
            reason="not_utf8",
            fix="save it as UTF-8",
        ) from error


def _shards(name: str) -> list[Path]:
    root = Path(name)
    found = sorted(root.glob("*.tar")) if root.is_dir() else files_of(name)
    missing = next((path for path in found if not path.is_file()), None)
    if not found or missing is not None:
        raise DataError(
            "no tar file is there",
            where=str(missing or name),
            fix="name a tar file, or a folder with some, as data.train[].path",
        )
    return found


def _key(name: str) -> str:
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    return stem if str(path.parent) == "." else f"{path.parent}/{stem}"


def _members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields key, name, first byte and size of every plain file of an archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = info.name.removeprefix("./")
                if info.isreg() and not PurePosixPath(name).name.startswith("."):
                    yield _key(name), name, info.offset_data, info.size
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"this is no plain tar file: {error}",
            where=str(path),
            fix="unpack a compressed archive first (gunzip, zstd -d): its members have no place in"
            " the file that could be read at once",
        ) from error

"""The index of one source: a few numbers for every row, as plain arrays that are mapped, not read.

Rows that cannot be used are listed with their reasons beside the arrays; there are few of them, or
the run stops.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vistune.data.kept import Hold
from vistune.types import Rejected

_META, _REJECTED = "meta.json", "rejected.jsonl"

SCRIPTS = ("none", "latin", "chinese", "japanese", "korean", "cyrillic", "arabic", "other")
"""Scripts a row's text may be written in, by number; "none" has no letters."""


@dataclass(frozen=True)
class RowColumns:
    """One value for every row, or for every image.

    Args:
        usable: bool [R].
        notes: uint32 [R]; bit k stands for `SourceIndex.note_names[k]`.
        script: uint8 [R]; number of the main script in `SCRIPTS`.
        text_tokens: int32 [R]; tokens of text before any limit. 0 where a row is not usable.
        image_tokens: int32 [R].
        target_tokens: int32 [R].
        id_hash: uint64 [R]; equal for equal ids.
        content_hash: uint64 [R]; equal for equal conversations about the same image names.
        first_image: int64 [R + 1]; the images of row r are first_image[r] to first_image[r + 1].
        image_size: int32 [N, 2]; height and width of every image.
        image_name: uint64 [N]; equal for equal files. Empty where nothing was decoded.
        image_hash: uint64 [N]; equal for images that look alike. Empty as well.
    """

    usable: npt.NDArray[np.bool_]
    notes: npt.NDArray[np.uint32]
    script: npt.NDArray[np.uint8]
    text_tokens: npt.NDArray[np.int32]
    image_tokens: npt.NDArray[np.int32]
    target_tokens: npt.NDArray[np.int32]
    id_hash: npt.NDArray[np.uint64]
    content_hash: npt.NDArray[np.uint64]
    first_image: npt.NDArray[np.int64]
    image_size: npt.NDArray[np.int32]
    image_name: npt.NDArray[np.uint64]
    image_hash: npt.NDArray[np.uint64]

    @classmethod
    def joined(cls, parts: Sequence[RowColumns]) -> RowColumns:
        """Returns the columns of consecutive stretches of rows, end to end."""
        arrays = {
            name: np.concatenate([part.array(name) for part in parts])
            for name in cls.names()
            if name != "first_image"
        }
        counts = np.concatenate([np.diff(part.first_image) for part in parts])
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(**arrays, first_image=first)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of the columns."""
        return tuple(entry.name for entry in fields(cls))

    def array(self, name: str) -> npt.NDArray[Any]:
        """Returns a column by name."""
        column: npt.NDArray[Any] = self.__dict__[name]
        return column

    def __len__(self) -> int:
        return int(self.usable.size)


@dataclass(frozen=True)
class SourceIndex:
    """The index of one source.

    Args:
        columns: A value for every row.
        rejected: Rows that cannot be used, by number.
        note_names: What the bits of `columns.notes` mean.
        num_tokenised: Rows that had to be tokenised to be counted.
        folder: Where it is kept; None for one that is not.
        hold: Keeps it from being removed while it is mapped.
    """

    columns: RowColumns
    rejected: dict[int, Rejected]
    note_names: tuple[str, ...]
    num_tokenised: int = 0
    folder: Path | None = None
    hold: Hold | None = field(default=None, repr=False, compare=False)

    @classmethod
    def joined(cls, parts: Sequence[SourceIndex]) -> SourceIndex:
        """Returns the index of consecutive stretches of rows, end to end."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.note_names))
        assert len(names) <= 32
        rejected: dict[int, Rejected] = {}
        columns = []
        first = 0
        for part in parts:
            rejected.update({first + row: why for row, why in part.rejected.items()})
            columns.append(part.renamed(names))
            first += len(part.columns)
        tokenised = sum(part.num_tokenised for part in parts)
        return cls(RowColumns.joined(columns), rejected, names, tokenised)

    def noted(self, name: str) -> npt.NDArray[np.bool_]:
        """Returns bool [R]: which rows carry a note."""
        if name not in self.note_names:
            return np.zeros(len(self.columns), dtype=np.bool_)
        bit = np.uint32(1 << self.note_names.index(name))
        return (self.columns.notes & bit).astype(np.bool_)

    def renamed(self, names: tuple[str, ...]) -> RowColumns:
        """Returns the columns with the notes' bits as another list of names counts them."""
        if names == self.note_names:
            return self.columns
        notes = np.zeros(len(self.columns), dtype=np.uint32)
        for name in self.note_names:
            notes |= self.noted(name).astype(np.uint32) << np.uint32(names.index(name))
        return RowColumns(**{**self.columns.__dict__, "notes": notes})

    def save(self, folder: Path, *, meta: dict[str, Any] | None = None) -> None:
        """Writes the index into an empty folder.

        Args:
            folder: The folder.
            meta: Kept beside it, to be read by people.
        """
        for name in RowColumns.names():
            np.save(folder / f"{name}.npy", self.columns.array(name))
        with (folder / _REJECTED).open("w", encoding="utf-8") as file:
            for row, why in self.rejected.items():
                line = {"row": row, **asdict(why)}
                file.write(json.dumps(line, ensure_ascii=True) + "\n")
        own = {"note_names": self.note_names, "num_tokenised": self.num_tokenised}
        (folder / _META).write_text(json.dumps({**(meta or {}), **own}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, *, mapped: bool = True) -> SourceIndex:
        """Opens an index; its arrays are mapped and read when they are looked at.

        Args:
            folder: The folder.
            mapped: False reads them now: every mapped array costs a file descriptor.

        Raises:
            OSError: A file is not there.
            ValueError: A file is damaged.
        """
        hold = Hold(folder / _META) if mapped else None
        meta = json.loads((folder / _META).read_text())
        # Arrays of nothing cannot be mapped.
        columns = RowColumns(
            **{
                name: np.load(path, mmap_mode="r" if mapped and path.stat().st_size > 128 else None)
                for name, path in ((name, folder / f"{name}.npy") for name in RowColumns.names())
            }
        )
        rejected = {}
        # Not splitlines: a text may hold other characters that end a line.
        for line in (folder / _REJECTED).read_text(encoding="utf-8").split("\n"):
            if line:
                content = json.loads(line)
                row = content.pop("row")
                rejected[row] = Rejected(**content)
        names, tokenised = tuple(meta["note_names"]), meta["num_tokenised"]
        return cls(columns, rejected, names, tokenised, folder, hold)


@dataclass
class Draft:
    """Columns while rows are added one by one."""

    values: list[tuple[int, ...]] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_names: list[int] = field(default_factory=list)
    image_hashes: list[int] = field(default_factory=list)
    note_names: dict[str, int] = field(default_factory=dict)
    rejected: dict[int, Rejected] = field(default_factory=dict)

    def bits(self, notes: Sequence[str]) -> int:
        """Returns the bits of notes, new names included."""
        out = 0
        for name in notes:
            out |= 1 << self.note_names.setdefault(name, len(self.note_names))
        return out

    def index(self, *, num_tokenised: int) -> SourceIndex:
        """Returns the index of the rows added."""
        names = ("usable", "notes", "script", "text_tokens", "image_tokens", "target_tokens")
        table = np.array(self.values, dtype=np.uint64).reshape(len(self.values), len(names) + 2)
        types = (np.bool_, np.uint32, np.uint8, np.int32, np.int32, np.int32)
        arrays: dict[str, npt.NDArray[Any]] = {
            name: table[:, k].astype(kind)
            for k, (name, kind) in enumerate(zip(names, types, strict=True))
        }
        columns = RowColumns(
            **arrays,
            id_hash=table[:, -2].copy(),
            content_hash=table[:, -1].copy(),
            first_image=np.concatenate([[0], np.cumsum(self.num_images)]).astype(np.int64),
            image_size=np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            image_name=np.array(self.image_names, dtype=np.uint64),
            image_hash=np.array(self.image_hashes, dtype=np.uint64),
        )
        return SourceIndex(columns, self.rejected, tuple(self.note_names), num_tokenised)

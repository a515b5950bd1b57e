"""Finds out how a dataset is written from what it holds, where nobody said so.

Names are only looked at where they are part of a format (an image's ending, `labels_en/`). What
could be several things is refused with all of them named; a recipe always says its format.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vistune.data.formats.image_folder import IMAGE_SUFFIXES
from vistune.data.formats.json_rows import open_rows
from vistune.data.formats.parquet_rows import is_parquet
from vistune.data.formats.paths import files_of, is_pattern
from vistune.errors import DataError, RowError

_HEAD_BYTES = 1 << 16
_ROWS = 32
"""Rows that are looked at."""
_FILES = 2_000
"""Files of a folder that are looked at for an image."""
_COCO = re.compile(r'"(images|annotations)"\s*:\s*\[\s*\{')
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_IMAGE_COLUMNS = {"image", "file_name", "path", "img"}
_CAPTION_COLUMNS = {"caption", "text", "label"}


@dataclass(frozen=True)
class Detected:
    """How a dataset is written, and where it really lies.

    Args:
        format: Name of the format.
        path: What `data.train[].path` has to be: a folder may hold the dataset.
    """

    format: str
    path: str


def detect(path: str) -> Detected:
    """Returns how a dataset is written.

    Args:
        path: A file, a folder, or shards with wildcards.

    Raises:
        DataError: Nothing is there, it is none of the known formats, or it could be several.
    """
    if is_pattern(path):
        files = [file for file in files_of(path) if file.is_file()]
        if not files:
            raise DataError("no file is called so", where=path, fix="check the wildcards")
        if not all(_is_tar(file) for file in files):
            raise DataError(
                "wildcards may only name tar shards",
                where=path,
                got=next(str(file) for file in files if not _is_tar(file)),
                fix="name one file or folder",
            )
        return Detected("webdataset", path)
    if not Path(path).exists():
        raise DataError("nothing is there", where=path, fix="check the path")
    found = list(_of_folder(Path(path)) if Path(path).is_dir() else _of_file(Path(path)))
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            "this is no dataset of a known format",
            where=path,
            got=_description(Path(path)),
            fix="name the format with --format",
        )
    raise DataError(
        "this could be several datasets",
        where=path,
        got="; ".join(f"{one.format}: {one.path}" for one in found),
        expected="one",
        fix="name the file or folder meant, or the format with --format",
    )


def _of_folder(folder: Path) -> Iterator[Detected]:
    """Yields what a folder may be."""
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.is_file()]
    if any(entry.suffix == ".tar" for entry in files):
        yield Detected("webdataset", str(folder))
    if any(is_parquet(entry) for entry in files if entry.suffix == ".parquet"):
        yield from _of_rows(folder)
    labels = _label_folders(folder, entries)
    for one in labels:
        yield Detected("cogvlm_sft", str(one))
    if labels:
        return
    listed = [entry for entry in files if entry.suffix in (".json", ".jsonl", ".csv", ".tsv")]
    for entry in listed:
        yield from _of_file(entry)
    # Images that a list names need no caption beside them.
    if _has_image(folder, captioned=bool(listed)):
        yield Detected("image_folder", str(folder))


def _label_folders(folder: Path, entries: list[Path]) -> list[Path]:
    """Returns the label folders of CogVLM-SFT: this one, or those beside its `images`."""
    if (folder.parent / "images").is_dir() and folder.name != "images" and _is_label(entries):
        return [folder]
    if not (folder / "images").is_dir():
        return []
    others = [entry for entry in entries if entry.is_dir() and entry.name != "images"]
    return [one for one in others if _is_label(sorted(one.iterdir()))]


def _is_label(entries: list[Path]) -> bool:
    files = (entry for entry in entries if entry.suffix.lower() == ".json" and entry.is_file())
    first = next(files, None)
    if first is None:
        return False
    try:
        content = json.loads(first.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    turns = content.get("conversations") if isinstance(content, dict) else None
    return isinstance(turns, list) and any(isinstance(t, dict) and "role" in t for t in turns)


def _has_image(folder: Path, *, captioned: bool) -> bool:
    """Returns whether a folder holds an image; one with a text file beside it, if asked for."""
    seen = 0
    for _, _, names in os.walk(folder):
        texts = {Path(name).stem for name in names if name.endswith(".txt")}
        for name in names:
            is_image = Path(name).suffix.lower() in IMAGE_SUFFIXES
            if is_image and (Path(name).stem in texts or not captioned):
                return True
            seen += 1
        if seen > _FILES:
            break
    return False


def _of_file(path: Path) -> Iterator[Detected]:
    """Yields what a file may be."""
    if not path.is_file():
        raise DataError(
            "this is a pipe, a device or a socket", where=str(path), fix="name a file or a folder"
        )
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise DataError(
            "the dataset file is empty", where=str(path), fix="fetch or write the file again"
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(_COMPRESSED) or _is_tar(path):
        yield Detected("webdataset", str(path))
    elif is_parquet(path) or text[:1] == b"[":
        yield from _of_rows(path)
    elif text[:1] == b"{":
        if _is_coco(path, text):
            yield Detected("coco_captions", str(path))
        else:
            yield from _of_rows(path)
    elif _is_captions_csv(text):
        yield Detected("captions_csv", str(path))


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar":
        return True
    try:  # the old form, without the mark
        return len(head) == 512 and tarfile.TarInfo.frombuf(head, "utf-8", "replace").name != ""
    except tarfile.HeaderError:
        return False


def _is_coco(path: Path, head: bytes) -> bool:
    line = head.partition(b"\n")[0]
    if len(line) < len(head):
        try:  # one object a line, whatever its keys, is a row
            content = json.loads(line)
            return isinstance(content, dict) and {"images", "annotations"} <= set(content)
        except ValueError:
            pass
    return _COCO.search(head.decode("utf-8", "replace")) is not None


def _is_captions_csv(head: bytes) -> bool:
    line = head.partition(b"\n")[0].decode("utf-8", "replace")
    try:
        cells = next(csv.reader([line], delimiter="\t" if "\t" in line else ","), [])
    except csv.Error:  # a carriage return inside the line: no header of ours
        return False
    names = {cell.strip() for cell in cells}
    return bool(names & _IMAGE_COLUMNS) and bool(names & _CAPTION_COLUMNS)


_IsRow: TypeAlias = Callable[[dict[str, Any]], bool]


def _has_turns(row: dict[str, Any]) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and all(isinstance(t, dict) and "from" in t for t in turns)


_ROW_FORMATS: dict[str, _IsRow] = {
    "llava": lambda row: _has_turns(row) and not {"images", "system", "tools"} & set(row),
    "sharegpt": lambda row: _has_turns(row) and "image" not in row,
    "messages": lambda row: isinstance(row.get("messages"), list),
    "xtuner": lambda row: isinstance(row.get("conversation"), list),
    "alpaca": lambda row: {"instruction", "output"} <= set(row),
    "visualglm": lambda row: {"prompt", "label"} <= set(row),
    "data_juicer": lambda row: (
        isinstance(row.get("text"), str) and ("images" in row or "__dj__" in row["text"])
    ),
}


def _of_rows(path: Path) -> Iterator[Detected]:
    """Yields the formats that all rows looked at may be in; rows of none are left out."""
    left: set[str] | None = None
    for row in _first_rows(path):
        may_be = {name for name, is_row in _ROW_FORMATS.items() if is_row(row)}
        if may_be:
            left = may_be if left is None else left & may_be
    if left is not None and not left:
        raise DataError(
            "its rows are written in different ways",
            where=str(path),
            got=", ".join(sorted(_keys(path))),
            fix="split the file; or name one format with --format, and rows of others are unusable",
        )
    # Rows without images mean the same in both.
    left = (left or set()) - ({"sharegpt"} if left and "llava" in left else set())
    yield from (Detected(name, str(path)) for name in _ROW_FORMATS if name in left)


def _first_rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = open_rows(path, max_rows=_ROWS)
    for number in range(len(rows)):
        try:
            row = rows.parse(number)
        except RowError:
            continue
        if isinstance(row, dict):
            yield row


def _keys(path: Path) -> set[str]:
    return {str(key) for row in _first_rows(path) for key in row}


def _description(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return f"a folder with {', '.join(names[:8]) or 'nothing in it'}"[:200]
    with path.open("rb") as file:
        begin = file.read(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n")
    if begin[:1] in (b"[", b"{") or is_parquet(path):
        keys = ", ".join(sorted(_keys(path)))
        return f"rows with the keys {keys}"[:200] if keys else "no row that can be read"
    return f"a file that begins with {begin[:40]!r}"


__all__ = ["Detected", "detect"]

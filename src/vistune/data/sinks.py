"""Where converted rows go: a file or a folder that appears whole at the end, or not at all.

A sink first says what stands for a sample's images, then takes the row; only then are images read.
Nothing here knows what a row means: see `data.convert`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from PIL import Image, UnidentifiedImageError

from vistune.data.formats.image_folder import IMAGE_SUFFIXES
from vistune.data.image_file import open_bytes, read_bytes
from vistune.errors import DataError, ImageError, MissingExtraError, RowError
from vistune.types import ImageRef

_PARQUET_ROWS = 64
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Sink(Protocol):
    """Takes rows one by one."""

    def key(self, id: str, *, row: int) -> str:
        """Returns what the row will be called there: its id where that can be kept."""

    def names(self, images: Sequence[ImageRef], *, key: str) -> list[Any]:
        """Returns what stands for the images in the row.

        Raises:
            RowError: An image cannot be named there.
        """

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row, with its images where the sink holds them.

        Raises:
            RowError: An image cannot be read.
        """

    def finish(self) -> None:
        """Writes what can only stand at the end."""


class Images:
    """How a sink's images are kept: by name where they are, or copied into a folder.

    Args:
        folder: Folder they are copied into; None keeps the names that the source wrote.
        root: The source's image folder, which names stay relative to.
    """

    def __init__(self, folder: Path | None, *, root: Path) -> None:
        self._folder, self._root = folder, Path(os.path.realpath(root))
        self._taken: dict[str, tuple[Path, tuple[int, int] | None] | None] = {}

    def name(self, ref: ImageRef, *, key: str, number: int) -> str:
        """Returns the name of an image there.

        Raises:
            DataError: The image stands inside the source, and no folder was named for it.
            ImageError: It has no known kind.
        """
        if self._folder is None:
            if ref.span is not None or ref.content is not None:
                raise DataError(
                    "the images stand inside the source, and the new file only names them",
                    where=ref.name,
                    fix="name a folder they are written to: --images-to FOLDER",
                )
            if Path(ref.name).is_absolute():
                return os.path.relpath(ref.path, self._root)
            return ref.name
        wanted = self._wanted(ref, key=key, number=number)
        same = None if ref.content is not None else (ref.path, ref.span)
        name, count = wanted, 1
        while name in self._taken and (same is None or self._taken[name] != same):
            count += 1
            path = PurePosixPath(wanted)
            name = str(path.with_name(f"{path.stem}-{count}{path.suffix}"))
        self._taken[name] = same
        return name

    def copy(self, ref: ImageRef, name: str) -> None:
        """Writes an image under its name, where images are copied.

        Raises:
            ImageError: It cannot be read.
        """
        if self._folder is None:
            return
        path = self._folder / name
        if not path.exists():
            content = image_bytes(ref)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _wanted(self, ref: ImageRef, *, key: str, number: int) -> str:
        path = PurePosixPath(ref.name)
        plain = not path.is_absolute() and ".." not in path.parts and not _SCHEME.match(ref.name)
        if plain and path.suffix.lower() in IMAGE_SUFFIXES:
            return str(path)
        return f"{file_stem(key)}_{number}{ending_of(ref)}"


class JsonSink:
    """Rows of a JSON list or JSONL.

    Args:
        file: Where they are written.
        images: How images are kept.
        is_list: A list instead of one row a line.
    """

    def __init__(self, file: IO[bytes], images: Images, *, is_list: bool) -> None:
        self._file, self._images, self._is_list = file, images, is_list
        self._names: list[str] = []
        self._started = False

    def key(self, id: str, *, row: int) -> str:
        """Returns what the row will be called."""
        return id

    def names(self, images: Sequence[ImageRef], *, key: str) -> list[Any]:
        """Returns what stands for the images."""
        self._names = [self._images.name(ref, key=key, number=k) for k, ref in enumerate(images)]
        return list(self._names)

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        for ref, name in zip(images, self._names, strict=True):
            self._images.copy(ref, name)
        text = json.dumps(content, ensure_ascii=False).encode("utf-8")
        if self._is_list:
            text = (b",\n" if self._started else b"[\n") + text
        else:
            text += b"\n"
        self._started = True
        self._file.write(text)

    def finish(self) -> None:
        """Writes what can only stand at the end."""
        if self._is_list:
            self._file.write(b"\n]\n" if self._started else b"[]\n")


class CsvSink(JsonSink):
    """Rows of a CSV file with a header.

    Args:
        file: Where they are written.
        images: How images are kept.
    """

    def __init__(self, file: IO[bytes], images: Images) -> None:
        super().__init__(file, images, is_list=False)
        file.write(b"id,image,question,caption\n")

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        for ref, name in zip(images, self._names, strict=True):
            self._images.copy(ref, name)
        text = io.StringIO()
        columns = ("id", "image", "question", "caption")
        csv.writer(text, lineterminator="\n").writerow([content[name] for name in columns])
        self._file.write(text.getvalue().encode("utf-8"))


class CocoSink(JsonSink):
    """COCO's caption file: one object. Of the rows, only image names are kept in memory.

    Args:
        file: Where it is written.
        images: How images are kept.
    """

    def __init__(self, file: IO[bytes], images: Images) -> None:
        super().__init__(file, images, is_list=True)
        self._image_ids: dict[str, int] = {}
        file.write(b'{"annotations": ')

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        image_id = self._image_ids.setdefault(self._names[0], len(self._image_ids) + 1)
        super().add({**content, "image_id": image_id}, images, key=key)

    def finish(self) -> None:
        """Writes what can only stand at the end."""
        super().finish()
        listed = [{"id": id, "file_name": name} for name, id in self._image_ids.items()]
        text = json.dumps(listed, ensure_ascii=False)
        self._file.write(b', "images": ' + text.encode("utf-8") + b"}\n")


class ParquetSink:
    """Rows of a Parquet file; images stand in the rows, as the hub's image columns.

    Args:
        file: Where it is written.
        format: Which format's columns: llava, sharegpt or messages.

    Raises:
        DataError: The format has no columns here.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, file: IO[bytes], *, format: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError.of(
                "pyarrow", extra="parquet", purpose="writing Parquet"
            ) from error
        text = pa.string()
        images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", text)]))
        said = pa.list_(pa.struct([("from", text), ("value", text)]))
        parts = pa.list_(pa.struct([("type", text), ("text", text)]))
        messages = pa.list_(pa.struct([("role", text), ("content", parts)]))
        columns = {
            "llava": [("image", images), ("conversations", said)],
            "sharegpt": [("system", text), ("images", images), ("conversations", said)],
            "messages": [("images", images), ("messages", messages)],
        }
        if format not in columns:
            raise DataError(
                f"rows of the format {format} are not written as Parquet",
                got=format,
                expected=", ".join(columns),
                fix="write .jsonl, or another format",
            )
        self._schema = pa.schema([("id", text), *columns[format]])
        self._images_key = columns[format][0][0] if format != "sharegpt" else "images"
        self._rows: list[dict[str, Any]] = []
        self._table = pa.Table
        self._writer = pq.ParquetWriter(file, self._schema)

    def key(self, id: str, *, row: int) -> str:
        """Returns what the row will be called."""
        return id

    def names(self, images: Sequence[ImageRef], *, key: str) -> list[Any]:
        """Returns what stands for the images."""
        return [{"bytes": None, "path": ref.name} for ref in images]

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        held = [{"bytes": image_bytes(ref), "path": ref.name} for ref in images]
        self._rows.append({**content, self._images_key: held})
        if len(self._rows) == _PARQUET_ROWS:
            self._flush()

    def finish(self) -> None:
        """Writes what can only stand at the end."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


class TarSink:
    """One WebDataset shard: images, then the row as JSON.

    Args:
        file: Where it is written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._archive = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._keys: set[str] = set()
        self._names: list[str] = []

    def key(self, id: str, *, row: int) -> str:
        """Returns what the row will be called."""
        return id

    def names(self, images: Sequence[ImageRef], *, key: str) -> list[Any]:
        """Returns what stands for the images."""
        stem, count = file_stem(key).replace(".", "_"), 1
        self._stem = stem
        while self._stem in self._keys:
            count += 1
            self._stem = f"{stem}-{count}"
        endings = [ending_of(ref) for ref in images]
        if len(endings) == 1:
            self._names = [f"{self._stem}{endings[0]}"]
        else:
            self._names = [f"{self._stem}.{k}{ending}" for k, ending in enumerate(endings)]
        return list(self._names)

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        contents = [image_bytes(ref) for ref in images]
        self._keys.add(self._stem)
        for name, raw in zip(self._names, contents, strict=True):
            self._member(name, raw)
        text = json.dumps(content, ensure_ascii=False).encode("utf-8")
        self._member(f"{self._stem}.json", text)

    def finish(self) -> None:
        """Writes what can only stand at the end."""
        self._archive.close()

    def _member(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._archive.addfile(info, io.BytesIO(content))


class FolderSink:
    """A folder in which image and text lie beside each other under one stem.

    Args:
        folder: The folder, empty.
        text: Folder of the texts in it, and the ending of their names.
        images: Folder of the images in it.
    """

    def __init__(self, folder: Path, *, text: tuple[str, str], images: str) -> None:
        self._images, self._texts, self._ending = folder / images, folder / text[0], text[1]
        self._images.mkdir(exist_ok=True)
        self._texts.mkdir(exist_ok=True)
        self._keys: set[str] = set()

    def key(self, id: str, *, row: int) -> str:
        """Returns what the row will be called."""
        return folder_key(id, row=row, taken=self._keys)

    def names(self, images: Sequence[ImageRef], *, key: str) -> list[Any]:
        """Returns what stands for the images."""
        return [f"{key}{ending_of(ref)}" for ref in images]

    def add(self, content: dict[str, Any], images: Sequence[ImageRef], *, key: str) -> None:
        """Writes a row and its images."""
        for ref in images:
            raw = image_bytes(ref)
            (self._images / f"{key}{ending_of(ref)}").write_bytes(raw)
        self._keys.add(key)
        text = (
            content["caption"] if "caption" in content else json.dumps(content, ensure_ascii=False)
        )
        (self._texts / f"{key}{self._ending}").write_text(text, encoding="utf-8", newline="")

    def finish(self) -> None:
        """Writes what can only stand at the end: nothing."""


def folder_key(id: str, *, row: int, taken: set[str]) -> str:
    """Returns a file name's stem for a row, its id where that is one.

    Args:
        id: The row's id.
        row: Its number, for a stem that was taken.
        taken: Stems given before; this one is added.
    """
    stem = file_stem(id)
    stem = stem if stem not in taken else f"{stem}-row{row}"
    taken.add(stem)
    return stem


def file_stem(id: str) -> str:
    """Returns an id as it can stand in a file name, of at most 120 characters."""
    return re.sub(r"[^\w.-]+", "_", id).strip(".")[:120] or "row"


def ending_of(ref: ImageRef) -> str:
    """Returns the ending of an image's file name: its own, or that of its kind.

    Raises:
        ImageError: Its kind is not known.
    """
    suffix = PurePosixPath(ref.name).suffix.lower()
    if suffix in IMAGE_SUFFIXES and not _SCHEME.match(ref.name):
        return suffix
    try:
        with open_bytes(ref) as file, Image.open(file) as opened:
            kind = (opened.format or "").lower()
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise _unreadable(ref, error) from error
    return ".jpg" if kind in ("jpeg", "mpo") else f".{kind}"


def image_bytes(ref: ImageRef) -> bytes:
    """Returns the image file.

    Raises:
        ImageError: It cannot be read.
    """
    try:
        return read_bytes(ref)
    except OSError as error:
        raise _unreadable(ref, error) from error


def _unreadable(ref: ImageRef, error: Exception) -> RowError:
    missing = isinstance(error, FileNotFoundError)
    return ImageError(
        "the image is not there" if missing else f"the image cannot be read: {error}",
        reason="image_missing" if missing else "image_unreadable",
        where=ref.name,
        fix="fetch the image, or drop the row",
    )


@contextmanager
def appearing(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Gives a place to write to that becomes `path` when all went well, and is gone otherwise.

    Args:
        path: The file or folder to make; an older file is replaced.
        is_folder: Make a folder.

    Yields:
        The place, beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    else:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        part = Path(name)
    try:
        yield part
        part.chmod(0o777 & ~_umask() if is_folder else 0o666 & ~_umask())
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask

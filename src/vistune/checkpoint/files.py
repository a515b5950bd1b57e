"""The names of the files in a checkpoint, and the seal that says the others are whole.

A checkpoint is complete when `COMPLETE` is there: it is written last and names the size and the
SHA-256 digest of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vistune.errors import CheckpointError
from vistune.recipe import Section

WEIGHTS_NAME = "weights.safetensors"
"""Trained weights, by parameter name."""
INHERITED_NAME = "inherited.safetensors"
"""Weights that did not train in this run but differ from the parts: from the run gone on from."""
TRAINER_NAME = "trainer.pt"
"""Optimizer, schedule, random states, data position and counters."""
SEAL_NAME = "COMPLETE"
"""The seal."""
TEMPORARY_PREFIX = ".tmp_"
"""Start of the names of directories that are being written or deleted."""

_BLOCK_BYTES = 1 << 22


class FileSeal(Section):
    """What one file of a checkpoint must be."""

    num_bytes: int
    """Size."""
    sha256: str
    """Digest of the content."""


class Seal(Section):
    """The content of `COMPLETE`."""

    format_version: Literal[1] = 1
    """Version of this file's form."""
    step: int
    """Optimizer steps done."""
    files: dict[str, FileSeal]
    """Every other file of the directory and below it, by its path from there."""


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_seal(folder: Path, *, step: int) -> None:
    """Forces every file of `folder` to disk, then seals them.

    Args:
        folder: A directory whose files are all written.
        step: Optimizer steps done.
    """
    entries = sorted(folder.rglob("*"))
    paths = [path for path in entries if path.is_file() and path != folder / SEAL_NAME]
    for path in entries:
        sync(path)
    # Digests are computed in parallel: hashlib lets go of the interpreter lock.
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(sha256, paths))
    files = {
        path.relative_to(folder).as_posix(): FileSeal(num_bytes=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digests, strict=True)
    }
    seal = folder / SEAL_NAME
    seal.write_text(Seal(step=step, files=files).model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync(seal)
    sync(folder)


def read_seal(folder: Path) -> Seal:
    """Reads the seal of a checkpoint without looking at the other files.

    Raises:
        CheckpointError: It is missing or cannot be read: the checkpoint is not whole.
    """
    path = folder / SEAL_NAME
    try:
        return Seal.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the checkpoint has no {SEAL_NAME} file: it was not written to the end",
            where=str(folder),
        ) from error
    except (OSError, UnicodeDecodeError, ValidationError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"the checkpoint's {SEAL_NAME} file cannot be read",
            where=str(path),
            got=str(error).splitlines()[0],
        ) from error


def verify(folder: Path) -> Seal:
    """Checks every file of a checkpoint against its seal and returns the seal.

    Raises:
        CheckpointError: A file is missing, or its size or digest is another.
    """
    seal = read_seal(folder)
    for name, expected in seal.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError("a file of the checkpoint is missing", where=str(path))
        size = path.stat().st_size
        if size != expected.num_bytes:
            raise CheckpointError(
                "a file of the checkpoint is damaged: its size is another",
                where=str(path),
                got=f"{size} bytes",
                expected=f"{expected.num_bytes} bytes",
            )
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(lambda name: sha256(folder / name), seal.files)
        for (name, expected), digest in zip(seal.files.items(), digests, strict=True):
            if digest != expected.sha256:
                raise CheckpointError(
                    "a file of the checkpoint is damaged: its content is another",
                    where=str(folder / name),
                    got=f"sha256 {digest}",
                    expected=f"sha256 {expected.sha256}",
                )
    return seal


@contextmanager
def write_errors_explained(where: Path) -> Iterator[None]:
    """Turns the system's refusal to write into an error that says what to do.

    Args:
        where: What is being written.

    Raises:
        CheckpointError: The disk is full or may not be written.
    """
    try:
        yield
    except OSError as error:
        existing = next((p for p in (where, *where.parents) if p.exists()), Path("/"))
        free_gib = shutil.disk_usage(existing).free / (1 << 30)
        raise CheckpointError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or where),
            got=f"{free_gib:.3f} GiB free on this disk",
            fix="make room or give permission, then go on with --resume",
        ) from error


def follow_umask(folder: Path) -> None:
    """Gives the files of a directory the mode that the process's umask says.

    Safetensors' writer makes them readable by their owner alone, so that a model written for a
    group could be read by no one else in it.

    Args:
        folder: A directory; files in directories inside it are found too.
    """
    probe = folder / f"{TEMPORARY_PREFIX}mode"
    probe.touch()  # the umask can only be read by setting it, which other threads would see
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def sync(path: Path) -> None:
    """Forces a file's content, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Deletes a directory by renaming it first, so that no half of it is ever taken for a whole."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}old_{folder.name.lstrip('.')}_{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed)

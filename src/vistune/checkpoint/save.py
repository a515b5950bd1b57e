"""Writes checkpoints: all of one or nothing of it, and never at the cost of an earlier one.

A checkpoint is written into a temporary sibling, forced to disk, sealed, and only then given its
name. It knows files and tensors, not models or training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vistune.checkpoint.described import PARTS_NAME, take_along
from vistune.checkpoint.files import (
    INHERITED_NAME,
    TEMPORARY_PREFIX,
    TRAINER_NAME,
    WEIGHTS_NAME,
    discard,
    follow_umask,
    sync,
    write_seal,
)
from vistune.checkpoint.load import list_checkpoints
from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.errors import CheckpointError

_SLACK_BYTES = 1 << 20
_GIB = float(1 << 30)


@dataclass(frozen=True)
class CheckpointContent:
    """What one checkpoint holds.

    Args:
        step: Optimizer steps done.
        weights: Trained weights by parameter name.
        trainer: Optimizer, schedule, random states, data position, counters: tensors and plain
            Python values only, so that it can be read back without running code.
        manifest: What the checkpoint is.
        inherited: Weights that did not train but differ from the parts.
        parts: Folder of the parts' small files (see `described`), or None.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    trainer: Mapping[str, Any]
    manifest: Manifest
    inherited: Mapping[str, torch.Tensor]
    parts: Path | None = None

    def num_bytes(self) -> int:
        """Returns about how many bytes the checkpoint takes on disk."""
        tensors = [*self.weights.values(), *self.inherited.values(), *_tensors(self.trainer)]
        return sum(t.numel() * t.element_size() for t in tensors) + _SLACK_BYTES


def save_checkpoint(folder: Path, content: CheckpointContent, *, keep: int) -> Path:
    """Writes a checkpoint under its final name and removes the oldest beyond `keep`.

    Args:
        folder: The checkpoint's directory; its parent holds the run's other checkpoints.
        content: What to write.
        keep: How many of the newest checkpoints of the parent stay.

    Returns:
        `folder`.

    Raises:
        CheckpointError: The disk is full or may not be written; earlier checkpoints are untouched.
    """
    parent = folder.parent
    temporary = parent / f"{TEMPORARY_PREFIX}{folder.name}_{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _require_space(parent, folder, content)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        _write_files(temporary, content)
        if folder.exists():
            discard(folder)
        temporary.rename(folder)
        sync(parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors turn a full disk into errors of their own kind.
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(folder, content, error) from error
    except CheckpointError:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    rotate(parent, keep=keep, newest=folder)
    return folder


def _write_files(folder: Path, content: CheckpointContent) -> None:
    save_file(dict(content.weights), folder / WEIGHTS_NAME)
    if content.inherited:
        save_file(dict(content.inherited), folder / INHERITED_NAME)
    with (folder / TRAINER_NAME).open("wb") as file:
        torch.save(dict(content.trainer), file)
    if content.parts is not None:
        take_along(content.parts, folder / PARTS_NAME)
    write_manifest(folder, content.manifest)
    follow_umask(folder)
    write_seal(folder, step=content.step)


def rotate(parent: Path, *, keep: int, newest: Path) -> None:
    """Removes the oldest whole checkpoints of `parent` beyond `keep`; never `newest`."""
    for old in list_checkpoints(parent)[keep:]:
        if old != newest:
            discard(old)


def remove_stale(parent: Path) -> list[Path]:
    """Removes what interrupted writers left in `parent` and returns the paths removed."""
    if not parent.is_dir():
        return []
    stale = sorted(p for p in parent.iterdir() if p.name.startswith(TEMPORARY_PREFIX))
    for path in stale:
        shutil.rmtree(path)
    return stale


def _require_space(parent: Path, folder: Path, content: CheckpointContent) -> None:
    needed, free = content.num_bytes(), shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"not enough disk space for the checkpoint of step {content.step}:"
            f" {_size(needed)} needed, {_size(free)} free",
            where=str(folder),
            got=f"{free} bytes free",
            expected=f"{needed} bytes",
            fix="free space on this disk (or lower save.keep), then go on with --resume; earlier"
            " checkpoints are untouched",
        )


def _cannot_write(folder: Path, content: CheckpointContent, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    existing = next((p for p in (folder.parent, *folder.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    return CheckpointError(
        f"the checkpoint of step {content.step} could not be written: {reason}",
        where=str(folder),
        got=f"{_size(free)} free on this disk",
        expected=f"{_size(content.num_bytes())} and permission to write",
        fix="make room or give permission, then go on with --resume; earlier checkpoints are"
        " untouched",
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.3f} GiB" if num_bytes >= 1 << 24 else f"{num_bytes / 1024:.1f} KiB"


def _tensors(value: object) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)

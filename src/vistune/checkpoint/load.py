"""Finds and reads checkpoints: newest whole one first, a damaged one named, never taken silently.

It knows files and tensors, not models or training. Nothing is decided by what a directory is
called: a checkpoint is a directory with a seal, and its step stands in the seal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vistune.checkpoint.files import (
    SEAL_NAME,
    TEMPORARY_PREFIX,
    TRAINER_NAME,
    WEIGHTS_NAME,
    read_seal,
    verify,
)
from vistune.checkpoint.manifest import MANIFEST_NAME, read_manifest
from vistune.checkpoint.run_dir import RunDirectory
from vistune.errors import CheckpointError
from vistune.models.hub import fetch, is_hub_id

DEEPSPEED_NAME = "mp_rank_00_model_states.pt"
"""The weights in a directory that DeepSpeed wrote."""
SAT_CONFIG_NAME = "model_config.json"
"""What describes a model in SwissArmyTransformer's layout."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files were checked.

    Args:
        folder: Its directory.
        step: Optimizer steps done.
        damaged: What is wrong with newer ones, one sentence each, newest first.
    """

    folder: Path
    step: int
    damaged: tuple[str, ...] = ()


def list_checkpoints(parent: Path) -> list[Path]:
    """Returns the sealed checkpoints below `parent`, newest first; their files are not checked."""
    if not parent.is_dir():
        return []
    found: list[tuple[int, Path]] = []
    for path in parent.iterdir():
        if path.name.startswith(TEMPORARY_PREFIX) or not (path / SEAL_NAME).is_file():
            continue
        try:
            found.append((read_seal(path).step, path))
        except CheckpointError:
            continue  # an unreadable seal is reported by `newest_checkpoint`
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(parent: Path) -> FoundCheckpoint | None:
    """Returns the newest checkpoint below `parent` whose files are all whole, None without any.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    if not parent.is_dir():
        return None
    sealed = list_checkpoints(parent)
    damaged = [
        str(error)
        for path in sorted(parent.iterdir(), reverse=True)
        if path.is_dir() and not path.name.startswith(TEMPORARY_PREFIX) and path not in sealed
        for error in [_damage(path)]
        if error is not None
    ]
    for path in sealed:
        error = _damage(path)
        if error is None:
            return FoundCheckpoint(path, read_seal(path).step, tuple(damaged))
        damaged.append(str(error))
    if not damaged:
        return None
    raise CheckpointError(
        f"every checkpoint of the run is damaged ({len(damaged)})",
        where=str(parent),
        got="\n            ".join(damaged),
        fix="start again with --overwrite, or bring the files back from a backup",
    )


def _damage(folder: Path) -> CheckpointError | None:
    try:
        verify(folder)
    except CheckpointError as error:
        return error
    return None


_KEY = "model.from_checkpoint (or the path given)"


def resolve_checkpoint(
    path: str | Path, *, revision: str | None = None, weights: bool = True
) -> Path:
    """Returns the directory whose weights are meant by a path a person gives.

    Args:
        path: A run directory (its newest whole checkpoint is taken), a checkpoint, or the directory
            of a whole model of vistune or of another project, or what another project trained
            beside public models (see `is_partial`), or a hub id of one of these.
        revision: Branch, tag or commit of a hub id.
        weights: Whether the weights of a hub id are fetched too.

    Raises:
        ModelError: It is a hub id that is not in the cache and cannot be fetched.
        CheckpointError: It is not there, is damaged, or is none of these.
    """
    folder = Path(path)
    if len(folder.parts) == 2 and is_hub_id(str(path)):
        folder = fetch(str(path), key=_KEY, revision=revision, weights=weights)
    if not folder.exists():
        raise CheckpointError(
            "there is no such directory",
            where=str(path),
            expected="a run, a checkpoint of it, a model directory, or a hub id (owner/name)",
            fix="name one that is there; fetch a model of the hub into a directory with"
            " hf download OWNER/NAME --local-dir DIRECTORY",
        )
    if is_partial(folder):
        return folder
    if (folder / SEAL_NAME).is_file():
        verify(folder)
        return folder
    if (folder / MANIFEST_NAME).is_file():
        if read_manifest(folder).kind == "checkpoint":
            verify(folder)  # raises: a checkpoint without its seal was not written to the end
        return folder
    run = RunDirectory(folder)
    if run.recipe.is_file() or run.checkpoints.is_dir():
        found = newest_checkpoint(run.checkpoints)
        if found is None:
            raise CheckpointError(
                "the run has no checkpoint yet",
                where=str(folder),
                fix="let it reach its first checkpoint (save.every_steps) or its end",
            )
        return found.folder
    if (folder / "config.json").is_file() or (folder / SAT_CONFIG_NAME).is_file():
        return folder
    raise CheckpointError(
        "this is neither a run, nor a checkpoint, nor a model directory",
        where=str(folder),
        expected=f"recipe.yaml (a run), {SEAL_NAME} (a checkpoint) or config.json (a model)",
    )


def is_partial(path: Path) -> bool:
    """Whether this holds only what was trained, in another project's form, by the files there.

    XTuner's directories and checkpoints, and what the original LLaVA writes after its first stage
    and after LoRA; `checkpoint.layouts.partial` reads them. A run or a model of vistune never does.
    A single file can be nothing else: a connector's weights, with or without what training keeps.

    Args:
        path: A file or directory.
    """
    if path.is_file():
        return True
    if (path / SEAL_NAME).is_file() or (path / MANIFEST_NAME).is_file():
        return False
    if (path / "projector" / "config.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return (path / DEEPSPEED_NAME).is_file()
    if any(path.glob("*.safetensors.index.json")) or any(path.glob("model*.safetensors")):
        return False
    pieces = ("non_lora_trainables.bin", "mm_projector.bin")
    return not any(path.glob("pytorch_model*")) and any((path / n).is_file() for n in pieces)


def read_weights(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, torch.Tensor]:
    """Reads one weight file of a checkpoint into CPU memory.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = folder / name
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the weights cannot be read", where=str(path), got=str(error)
        ) from error
    return weights


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's training state into CPU memory. No code in the file is run.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = folder / TRAINER_NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            "the training state cannot be read", where=str(path), got=str(error).split("\n")[0]
        ) from error
    assert isinstance(state, dict)
    return state

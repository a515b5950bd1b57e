"""The small files of a model's parts, kept in every checkpoint: configs, tokenizers, processors.

    <checkpoint>/part_files/<role>/config.json, tokenizer.json, ...

Weights stay where they are and are told by their fingerprint. What a base's small files say may be
edited later, or by a newer release of the base; a checkpoint goes by its own. To whatever reads a
model's directory it is shown as one: `view` makes a directory for every part, in which the small
files are the checkpoint's and all others are links to the base.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.errors import CheckpointError
from vistune.models.hub import is_small
from vistune.recipe import BasesConfig, ModelConfig

PARTS_NAME = "part_files"
"""The folder of a run and of a checkpoint that holds the small files, one folder a role."""

# Role -> section and key of the parts that say where it is.
_PLACES: dict[str, tuple[str | None, str]] = {
    "vision": ("vision_tower", "path"),
    "language": ("language_model", "path"),
    "connector": ("connector", "weights"),
    "language adapter": ("language_model", "adapter"),
    "vision adapter": ("vision_tower", "adapter"),
    "aux": ("vision_tower_aux", "path"),
    "model": (None, "from_checkpoint"),
    "vision base": ("bases", "vision_tower"),
    "language base": ("bases", "language_model"),
}
_ROLES_OF_BASES = {
    "vision_tower": ("vision", "vision base"),
    "language_model": ("language", "language base"),
    "model": ("model",),
}
_SHOWN_KEYS = 6


def places(parts: ModelConfig) -> dict[str, Path]:
    """Returns where the parts are by role, there or not; a hub id is a path that is not there."""
    values = parts.model_dump()
    found: dict[str, Path] = {}
    for role, (section, key) in _PLACES.items():
        tree = values if section is None else values[section]
        if tree is not None and tree[key] is not None:
            found[role] = Path(tree[key]).expanduser()
    return found


def moved(parts: ModelConfig, to: dict[str, Path]) -> ModelConfig:
    """Returns the same parts at other places.

    Args:
        parts: The parts.
        to: Role -> its new place; other roles stay.
    """
    values = parts.model_dump()
    for role, place in to.items():
        section, key = _PLACES[role]
        tree = values if section is None else values[section]
        tree[key] = str(place)
    return ModelConfig.model_validate(values)


def on_bases(parts: ModelConfig, bases: BasesConfig) -> tuple[ModelConfig, list[str]]:
    """Returns a checkpoint's parts with the bases where a person says that they are now.

    Args:
        parts: The parts as recorded.
        bases: Where they are now; what is None stays.

    Returns:
        The parts, and the keys of `bases` that they have no place for.
    """
    named, to, homeless = places(parts), dict[str, Path](), list[str]()
    for key, value in bases.model_dump().items():
        role = next((role for role in _ROLES_OF_BASES[key] if role in named), None)
        if value is not None and role is not None:
            to[role] = Path(value)
        elif value is not None:
            homeless.append(key)
    return moved(parts, to), homeless


def keep_small_files(parts: ModelConfig, folder: Path) -> None:
    """Copies the small files of every part that is a local directory.

    Args:
        parts: The parts, or those of a view.
        folder: Made here; files of these names in it are replaced.
    """
    for role, place in places(parts).items():
        if not place.is_dir():
            continue
        target = folder / _slug(role)
        target.mkdir(parents=True, exist_ok=True)
        for file in _small_files(place):
            # Not written over: checkpoints hold links to what may be there already.
            fresh = target / f".{file.name}"
            shutil.copyfile(file, fresh)
            fresh.replace(target / file.name)


def take_along(folder: Path, into: Path) -> None:
    """Puts kept files into a checkpoint, as links to the same content where the disk allows it.

    Args:
        folder: Written by `keep_small_files`.
        into: The folder to make.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # no such links on this disk
            shutil.copyfile(source, target)

    shutil.copytree(folder, into, copy_function=link)


@dataclass(frozen=True)
class PartsView:
    """Parts as they were when a run started; its directories go when it is no longer held.

    Args:
        parts: The parts, at the places of the view.
        notes: What the bases say otherwise today, one sentence each.
    """

    parts: ModelConfig
    notes: tuple[str, ...]


def view(parts: ModelConfig, checkpoint: Path) -> PartsView | None:
    """Shows a checkpoint's parts with the small files that it keeps.

    Args:
        parts: Its parts; the weights are there.
        checkpoint: The checkpoint.

    Returns:
        None for a checkpoint of an earlier version, which keeps none.
    """
    kept = checkpoint / PARTS_NAME
    if not kept.is_dir():
        return None
    there = {role: place for role, place in places(parts).items() if (kept / _slug(role)).is_dir()}
    root = Path(tempfile.mkdtemp(prefix="vistune-"))
    shown = {role: root / _slug(role) for role in there}
    for role, place in there.items():
        _show(place, kept / _slug(role), shown[role])
    notes = [_difference(role, place, kept / _slug(role)) for role, place in there.items()]
    found = PartsView(moved(parts, shown), tuple(note for note in notes if note is not None))
    weakref.finalize(found, _remove, root, os.getpid())
    return found


def require_there(parts: ModelConfig, roles: Iterable[str], *, checkpoint: Path) -> None:
    """Refuses a checkpoint whose parts were on this machine and are not where they were.

    Args:
        parts: Its parts.
        roles: Those that were local when its run started.
        checkpoint: The checkpoint, for the message.

    Raises:
        CheckpointError: One is missing.
    """
    named = places(parts)
    for role in roles:
        if role in named and not named[role].exists():
            raise CheckpointError(
                f"the {_called(role)} that this stands on is not there any more",
                where=str(checkpoint),
                expected=str(named[role]),
                fix=_way_back(role),
            )


def _way_back(role: str) -> str:
    back = "bring it back to this place"
    key = next((key for key, roles in _ROLES_OF_BASES.items() if role in roles), None)
    if key is None:
        return f"{back}, or leave a link to it there"
    flag = "base-model" if key == "model" else key.replace("_", "-")
    resumed = f"model.{key}.path" if role in ("vision", "language") else f"model.bases.{key}"
    return (
        f"{back}, or say where it is now: --{flag} of chat, eval and export, {resumed} with"
        f" --resume, model.bases.{key} of a recipe that goes on from this"
    )


def _show(place: Path, kept: Path, shown: Path) -> None:
    shown.mkdir()
    for entry in place.iterdir():
        if not is_small(entry.name):
            (shown / entry.name).symlink_to(entry.absolute())
    for file in kept.iterdir():
        (shown / file.name).symlink_to(file.absolute())


def _remove(root: Path, process: int) -> None:
    if os.getpid() == process:  # a forked worker holds it too, and may end earlier
        shutil.rmtree(root, ignore_errors=True)


def _small_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and is_small(p.name))


def _slug(role: str) -> str:
    return role.replace(" ", "_")


def _called(role: str) -> str:
    names = {"vision": "vision tower", "language": "language model", "aux": "second tower"}
    return names.get(role, role)


def _difference(role: str, place: Path, kept: Path) -> str | None:
    """Says which small files of a base are others than those kept, and which keys of its config."""
    names = {file.name for file in (*_small_files(place), *kept.iterdir())}
    others = sorted(name for name in names if _content(place / name) != _content(kept / name))
    if not others:
        return None
    said = ", ".join(
        f"{name} ({keys})" if (keys := _keys(kept / name, place / name)) else name
        for name in others[:_SHOWN_KEYS]
    )
    more = f" and {len(others) - _SHOWN_KEYS} more" if len(others) > _SHOWN_KEYS else ""
    return (
        f"files of the {_called(role)} were changed since the run started: {said}{more} in"
        f" {place}; the checkpoint goes by its own copies"
    )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _keys(before: Path, now: Path) -> str:
    """Returns the keys of a config that differ, with both values; nothing for other files."""
    if before.name != "config.json":
        return ""
    old, new = _flat(before), _flat(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys[:_SHOWN_KEYS]]
    return "; ".join([*shown, *(["..."] if len(keys) > _SHOWN_KEYS else [])])


def _flat(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{prefix}.{key}" if prefix else key)
        else:
            found[prefix] = value

    walk(tree, "")
    return found

"""`vistune.json`: what a saved directory is, so that nothing depends on what it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vistune.errors import CheckpointError
from vistune.recipe import ModelConfig, Section

MANIFEST_NAME = "vistune.json"


_PLACES = {
    "vision_tower": ("path", "adapter"),
    "vision_tower_aux": ("path",),
    "language_model": ("path", "adapter"),
    "connector": ("weights",),
    "bases": ("vision_tower", "language_model"),
}


class Manifest(Section):
    """The description that lies beside every set of weights."""

    format_version: Literal[1] = 1
    """Version of this file's form."""
    vistune_version: str
    """Version that wrote it."""
    kind: Literal["checkpoint", "model"]
    """`checkpoint`: trained weights of a run, to lay over its parts. `model`: a whole model."""
    parts: ModelConfig | None = None
    """A checkpoint's parts: where the weights that did not train come from."""
    part_fingerprints: dict[str, str] = {}
    """Role -> digest of the part's weight files when the run started; a part changed since then
    is refused."""
    tune: dict[str, Any] = {}
    """What trained (the recipe's `tune`), needed to rebuild adapters before loading them."""
    seed: int = 0
    """Seed the connector and the adapters were initialised from."""
    merged_from: tuple[str, ...] = ()
    """Checkpoints whose trained weights are contained, oldest first."""
    encoder: dict[str, Any] = {}
    """Template, image plan, grid and image token: how text and images become tokens."""
    step: int | None = None
    """Optimizer steps done."""
    recipe: dict[str, Any] = {}
    """The resolved recipe of the run."""


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes `vistune.json` into `folder` and returns its path."""
    path = folder / MANIFEST_NAME
    text = json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a saved directory.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"no {MANIFEST_NAME}: this is not a directory saved by vistune", where=str(folder)
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "the manifest cannot be read", where=str(path), got=str(error).splitlines()[0]
        ) from error


def anchored(parts: ModelConfig) -> ModelConfig:
    """Returns parts whose local files and directories are named from the root.

    A checkpoint is read from other working directories than the one its run was started in; there
    `parts/tower` would be nothing, or the name of something on the hub.

    Args:
        parts: As a recipe names them; names of the hub stay as they are.
    """
    values = parts.model_dump()
    for section, keys in _PLACES.items():
        if values[section] is not None:
            values[section] |= {key: _anchored(values[section][key]) for key in keys}
    values["from_checkpoint"] = _anchored(values["from_checkpoint"])
    return ModelConfig.model_validate(values)


def _anchored(name: str | None) -> str | None:
    if name is None:
        return None
    place = Path(name).expanduser()
    return str(place.absolute()) if place.exists() else name

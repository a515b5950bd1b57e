"""Where the parts of a model are read from: those that the recipe names by hub id are fetched."""

from __future__ import annotations

from pathlib import Path

from vistune.checkpoint.described import moved, places
from vistune.models.hub import commit_of, fetch, is_hub_id
from vistune.recipe import ModelConfig

_KEYS = {
    "vision": "model.vision_tower.path",
    "language": "model.language_model.path",
    "aux": "model.vision_tower_aux.path",
    "model": "model.from_checkpoint",
    "vision base": "model.bases.vision_tower",
    "language base": "model.bases.language_model",
}


def located(parts: ModelConfig, *, weights: bool) -> ModelConfig:
    """Returns parts in which every hub id has become the directory that holds it.

    Args:
        parts: As a recipe or a manifest names them.
        weights: Whether the weights are needed, or configs and tokenizer alone.

    Raises:
        ModelError: One is neither on this machine nor can it be fetched.
    """
    return moved(parts, _fetched(parts, weights=weights))


def pinned(parts: ModelConfig) -> ModelConfig:
    """Returns parts in which every hub id says the commit that is read now.

    A branch goes on; what a run was started from does not.

    Args:
        parts: As a recipe names them.
    """
    values = parts.model_dump()
    sections = {"vision": "vision_tower", "language": "language_model"}
    for role, folder in _fetched(parts, weights=False).items():
        commit = commit_of(folder)
        if commit is not None and role == "model":
            values["revision"] = commit
        elif commit is not None and role in sections:
            values[sections[role]]["revision"] = commit
    return ModelConfig.model_validate(values)


def _fetched(parts: ModelConfig, *, weights: bool) -> dict[str, Path]:
    language = parts.language_model
    revisions = {
        "vision": parts.vision_tower.revision if parts.vision_tower else None,
        "language": language.revision if language else None,
        "model": parts.revision,
    }
    return {
        role: fetch(
            str(place),
            key=_KEYS[role],
            revision=revisions.get(role),
            weights=weights,
            gguf_file=language.gguf_file if language and role == "language" else None,
        )
        for role, place in places(parts).items()
        if role in _KEYS and is_hub_id(str(place))
    }

"""Turns pydantic's validation errors into messages that name the file, the line and the fix."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from vistune.errors import RecipeError
from vistune.registry import nearest


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Returns the section classes an annotation may hold (through unions, tuples, Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is None and not isinstance(annotation, types.UnionType):
        return []
    return [s for part in typing.get_args(annotation) for s in _sections_in(part)]


def _known_keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Returns the keys allowed in the section at `path` (list numbers are skipped)."""
    sections: list[type[BaseModel]] = [model]
    for part in path:
        if part.isdecimal():
            continue
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if not fields:
            # A tag pydantic inserts for the chosen member of a union.
            tagged = [s for s in sections if _has_tag(s, part)]
            sections = tagged or sections
            continue
        sections = [s for f in fields for s in _sections_in(f.annotation)]
    return sorted({key for s in sections for key in s.model_fields})


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    mode = section.model_fields.get("mode")
    return mode is not None and tag in typing.get_args(mode.annotation)


def _written_path(loc: tuple[int | str, ...], sources: Mapping[str, str]) -> str:
    """Returns the dotted key as the user wrote it: union tags that are not keys are left out."""
    parts = [str(part) for part in loc]
    known = {tuple(key.split(".")) for key in sources}
    kept: list[str] = []
    for index, part in enumerate(parts):
        candidate = (*kept, part)
        is_written = any(key[: len(candidate)] == candidate for key in known)
        if is_written or index == len(parts) - 1 or part.isdecimal():
            kept.append(part)
    return ".".join(kept)


def _where(key: str, sources: Mapping[str, str], origin: str) -> str:
    if key in sources:
        return sources[key]
    below = [where for name, where in sources.items() if name.startswith(key + ".")]
    if below:
        return below[0]
    parent = key.rpartition(".")[0]
    return _where(parent, sources, origin) if parent else origin


def explain(
    error: ValidationError,
    model: type[BaseModel],
    *,
    sources: Mapping[str, str],
    origin: str,
) -> RecipeError:
    """Returns one `RecipeError` that lists every problem with its place and the nearest key.

    Args:
        error: What pydantic found.
        model: The root section.
        sources: Dotted key -> where it was written.
        origin: The recipe file, for keys written nowhere.
    """
    lines = []
    for problem in error.errors(include_url=False):
        key = _written_path(problem["loc"], sources)
        path = tuple(str(part) for part in problem["loc"])
        where = _where(key, sources, origin)
        kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = _known_keys(model, path[:-1])
            close = nearest(path[-1], known)
            hint = f"did you mean '{close}'?" if close else "known: " + ", ".join(known)
            text = f"unknown key '{key}'; {hint}"
        elif kind == "missing":
            text = f"the key '{key}' is missing"
        elif kind == "value_error":
            text = f"{key}: {message}" if key else message
        else:
            text = f"{key}: {message} (got {problem['input']!r})"
        lines.append(f"{where}: {text}")
    head = "the recipe does not fit the schema" if len(lines) > 1 else "the recipe does not fit"
    return RecipeError(head + "".join(f"\n  {line}" for line in lines), fix="vistune recipe schema")

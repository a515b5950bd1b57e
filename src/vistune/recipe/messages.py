"""Turns pydantic's validation errors into messages that name the file, the line and the fix."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from vistune.errors import RecipeError
from vistune.registry import nearest

_MAX_SHOWN = 80
_MAX_LISTED = 8


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Returns the section classes an annotation may hold (through unions, tuples, Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is None and not isinstance(annotation, types.UnionType):
        return []
    return [s for part in typing.get_args(annotation) for s in sections_in(part)]


def _sections_at(model: type[BaseModel], path: tuple[str, ...]) -> list[type[BaseModel]]:
    """Returns the sections that may stand at `path` (list numbers are skipped)."""
    sections: list[type[BaseModel]] = [model]
    for part in path:
        if part.isdecimal():
            continue
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if not fields:
            # A tag pydantic inserts for the chosen member of a union.
            sections = [s for s in sections if _has_tag(s, part)] or sections
            continue
        sections = [s for f in fields for s in sections_in(f.annotation)]
    return sections


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    mode = section.model_fields.get("mode")
    return mode is not None and tag in typing.get_args(mode.annotation)


def _modes_with(path: tuple[str, ...], model: type[BaseModel]) -> list[str]:
    """Returns the modes of a section that have the key refused in the mode that was chosen."""
    *parent, chosen, key = path if len(path) > 1 else ("", *path)
    siblings = _sections_at(model, tuple(parent))
    if not any(_has_tag(section, chosen) for section in siblings):
        return []
    found = [section for section in siblings if key in section.model_fields]
    return sorted({tag for section in found for tag in _tags(section, "mode")})


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields every dotted key below a section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _hint(unknown: str, path: tuple[str, ...], model: type[BaseModel]) -> str:
    """Returns what an unknown key may have been meant to be."""
    known = _known_at(path, model)
    elsewhere = sorted({key for key in _all_keys(model) if key.rpartition(".")[2] == unknown})
    close = nearest(unknown, known)
    if elsewhere and (close is None or len(elsewhere) == 1):
        meant = "did you mean " + " or ".join(f"'{key}'" for key in elsewhere[:4]) + "?"
        return meant if len(known) > _MAX_LISTED else f"{meant} known here: {', '.join(known)}"
    if close is not None:
        return f"did you mean '{close}'?"
    return "known: " + ", ".join(known) if known else "no key is known here"


def _known_at(path: tuple[str, ...], model: type[BaseModel]) -> list[str]:
    return sorted({key for s in _sections_at(model, path) for key in s.model_fields})


def _written_path(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Returns the dotted key as the user wrote it: what pydantic adds for unions is left out."""
    parts = [str(part) for part in problem["loc"]]
    kept: list[str] = []
    sections: list[type[BaseModel]] = [model]
    for index, part in enumerate(parts):
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        is_unknown_key = problem["type"] == "extra_forbidden" and index == len(parts) - 1
        if fields:
            sections = [s for f in fields for s in sections_in(f.annotation)]
            kept.append(part)
        elif part.isdecimal() or is_unknown_key:
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


def _sentence(problem: Mapping[str, Any], key: str, model: type[BaseModel]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        elsewhere = _modes_with(path, model)
        if elsewhere:
            mode = f"{key.rpartition('.')[0]}.mode"
            return (
                f"'{key}' belongs to {mode}={' or '.join(elsewhere)}, and the mode is '{path[-2]}':"
                " leave it out or set that mode"
            )
        return f"unknown key '{key}'; {_hint(path[-1], path[:-1], model)}"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = problem["ctx"]["discriminator"].strip("'")
        tags = sorted({t for s in _sections_at(model, path) for t in _tags(s, tag)})
        given = problem["ctx"].get("tag")
        found = "is missing" if given is None else f"is '{given}'"
        return f"'{key}.{tag}' {found}; set it to one of: {', '.join(tags)}"
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in ("model_type", "model_attributes_type"):
        message = f"it holds the keys {', '.join(_known_at(path, model))}, not a value"
    shown = "null" if problem["input"] is None else repr(problem["input"])
    shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 3] + "..."
    return f"{key}: {message} (got {shown})"


def _tags(section: type[BaseModel], tag: str) -> tuple[str, ...]:
    field = section.model_fields.get(tag)
    return () if field is None else typing.get_args(field.annotation)


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
    by_key: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        key = _written_path(problem, model)
        by_key.setdefault(key, []).append(_sentence(problem, key, model))
    found: list[tuple[str, str]] = []
    for key, sentences in by_key.items():
        # One value refused by every member of a union is one problem, not several.
        first, *others = sentences
        also = [s.removeprefix(f"{key}: ").rpartition(" (got ")[0] for s in others]
        text = "; or ".join([first, *filter(None, also)])
        found.append((_where(key, sources, origin), text))
    fix = "vistune recipe schema lists every key"
    if len(found) == 1:
        where, text = found[0]
        return RecipeError(text, where=where, fix=fix)
    lines = "".join(f"\n  {where}: {text}" for where, text in found)
    return RecipeError(f"{len(found)} values do not fit the schema{lines}", fix=fix)

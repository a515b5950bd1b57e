"""The reference of every recipe key, made from the schema itself: JSON Schema and Markdown.

Nothing is written twice: defaults, types and help come from `schema.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vistune.errors import RecipeError
from vistune.recipe.messages import sections_in
from vistune.recipe.schema import Recipe
from vistune.registry import nearest


@dataclass(frozen=True)
class KeyReference:
    """One line of the reference.

    Args:
        key: Dotted key; `N` stands for the number of a list entry.
        type: What may be written, as in YAML.
        default: The default as in YAML, or None where the key must be given.
        help: The field's docstring in one line.
        form: For a section of several forms, the value of its tag this key belongs to.
    """

    key: str
    type: str
    default: str | None
    help: str
    form: str | None = None


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, `base` included, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    names = {"type": "array", "items": {"type": "string"}}
    schema["properties"]["base"] = {
        "anyOf": [{"type": "string"}, names],
        "description": "Recipe or recipes this one is laid over: a path beside it, or a shipped"
        " name.",
    }
    # What a base may supply cannot be demanded of the file alone.
    schema.pop("required", None)
    return schema


def references(section: str = "") -> list[KeyReference]:
    """Returns the reference of every key, or of those at and below one.

    Args:
        section: Dotted key; empty for all.

    Raises:
        RecipeError: There is no such key.
    """
    everything = list(_walk(Recipe, "", None))
    if not section:
        return everything
    wanted = re.sub(r"\.\d+(?=\.|$)", ".N", section)
    found = [r for r in everything if r.key == wanted or r.key.startswith((wanted + ".",))]
    if not found:
        close = nearest(wanted, [r.key for r in everything])
        raise RecipeError(
            f"no recipe key '{section}'" + (f"; did you mean '{close}'?" if close else ""),
            fix="vistune recipe schema lists every key",
        )
    return found


def markdown(section: str = "") -> str:
    """Returns the reference as one Markdown table per section.

    Args:
        section: Dotted key; empty for all.
    """
    groups: dict[str, list[KeyReference]] = {}
    for reference in references(section):
        form = f" (mode: {reference.form})" if reference.form else ""
        groups.setdefault(reference.key.rpartition(".")[0] + form, []).append(reference)
    lines = ["# Recipe reference", ""]
    for title, group in groups.items():
        lines += [f"## {title or 'recipe'}", "", "| key | type | default | |", "|---|---|---|---|"]
        for item in group:
            default = "**required**" if item.default is None else f"`{item.default}`"
            cells = (f"`{item.key}`", item.type, default, item.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _walk(section: type[BaseModel], prefix: str, form: str | None) -> Iterator[KeyReference]:
    for name, field in section.model_fields.items():
        key = prefix + name
        below = sections_in(field.annotation)
        is_list = _is_tuple_of_sections(field)
        yield KeyReference(key, _type(field, section, name), _default(field), _help(field), form)
        for part in below:
            tag = part.model_fields.get("mode") if field.discriminator else None
            part_form = _literal(tag) if tag is not None else None
            yield from _walk(part, f"{key}.N." if is_list else f"{key}.", part_form)


def _is_tuple_of_sections(field: FieldInfo) -> bool:
    return bool(sections_in(field.annotation)) and "tuple" in str(field.annotation)


def _literal(tag: FieldInfo) -> str:
    return str(tag.annotation.__args__[0])  # type: ignore[union-attr]


def _help(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        mode = value.model_dump().get("mode") if field.discriminator else None
        return f"{{mode: {mode}}}" if mode else "as below"
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) if value != "" else '""'


def _type(field: FieldInfo, section: type[BaseModel], name: str) -> str:
    """Returns what may be written, read off the JSON Schema, which knows the bounds."""
    if sections_in(field.annotation):
        return "list of sections" if _is_tuple_of_sections(field) else "section"
    schema = section.model_json_schema()
    return _schema_type(schema["properties"][name])


def _schema_type(part: dict[str, Any]) -> str:
    if "anyOf" in part:
        return " or ".join(_schema_type(option) for option in part["anyOf"])
    if "const" in part:
        return str(part["const"])
    if "enum" in part:
        return ", ".join(str(value) for value in part["enum"])
    if part.get("type") == "array":
        items = part.get("prefixItems")
        of = _schema_type(part["items"]) if "items" in part else "value"
        return f"list of {len(items)} {_schema_type(items[0])}s" if items else f"list of {of}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[name]:g}" for name, sign in bounds.items() if name in part]
    return " ".join([str(part.get("type", "value")), *limits])

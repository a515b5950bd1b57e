"""Reads a recipe: defaults <- base recipes <- the file <- key=value, each value with its source.

Not a template language: a recipe is plain YAML, and what it resolves to can be printed whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from vistune.errors import RecipeError
from vistune.recipe.messages import explain
from vistune.recipe.schema import Recipe
from vistune.registry import nearest

KeyPath: TypeAlias = tuple[str, ...]
_MAX_BASES = 16


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with the origin of each value.

    Args:
        recipe: The validated recipe.
        sources: Dotted key -> "file.yaml:12", "command line" or, for keys not listed, the default.
        origin: The file (or shipped name) it was read from.
    """

    recipe: Recipe
    sources: Mapping[str, str]
    origin: str

    def source_of(self, key: str) -> str:
        """Returns where the value of a dotted key came from."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            found = self.sources.get(".".join(parts[:end]))
            if found is not None:
                return found
        return "default"

    def to_yaml(self, *, with_sources: bool = False) -> str:
        """Returns the whole recipe as YAML, each value followed by its origin on request."""
        text = yaml.safe_dump(
            self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )
        return _annotate(text, self) if with_sources else text


def _annotate(text: str, resolved: ResolvedRecipe) -> str:
    """Appends `# origin` to every line of block YAML that holds a value."""
    sources = _positions(yaml.compose(text, Loader=yaml.SafeLoader))
    lines = text.rstrip("\n").split("\n")
    width = min(max(map(len, lines)), 60)
    for key, line in sources.items():
        dotted = ".".join(key)
        lines[line] = f"{lines[line]:<{width}}  # {resolved.source_of(dotted)}"
    return "\n".join(lines) + "\n"


def _positions(node: yaml.Node | None, prefix: KeyPath = ()) -> dict[KeyPath, int]:
    """Returns the line (from 0) of every scalar and empty collection below `node`."""
    found: dict[KeyPath, int] = {}
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            found |= _positions(value, (*prefix, str(key.value)))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            found |= _positions(value, (*prefix, str(index)))
    elif node is not None:
        found[prefix] = node.start_mark.line
    return found


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name."""
    folder = Path(str(resources.files("vistune"))) / "recipes"
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str, *, beside: Path | None = None) -> Path:
    """Returns the file a recipe name means: a path, or the name of a shipped recipe.

    Raises:
        RecipeError: Neither exists.
    """
    candidates = [Path(name)] if beside is None else [beside / name, Path(name)]
    for path in candidates:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    close = nearest(name, list(shipped))
    raise RecipeError(
        f"no recipe '{name}': neither a .yaml file nor a shipped recipe",
        expected=(f"did you mean '{close}'? " if close else "") + "known: " + ", ".join(shipped),
        fix="vistune recipe list",
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice, which YAML itself would let the later one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is written twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8 text", where=str(path), got=error) from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{path}{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(tree, dict):
        found = "an empty file" if tree is None else type(tree).__name__
        raise RecipeError("a recipe is a mapping of keys", where=str(path), got=found)
    return tree, {k: f"{path}:{line + 1}" for k, line in _positions(node).items()}


def _merge(below: Any, above: Any) -> Any:
    """Lays `above` over `below`: mappings key by key, everything else whole.

    A mapping whose `mode` differs replaces the other: the keys of one mode mean nothing in another.
    """
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "mode" in above and above["mode"] != below.get("mode") and "mode" in below:
        return above
    return {**below, **{k: _merge(below[k], v) if k in below else v for k, v in above.items()}}


def _load_with_bases(path: Path, depth: int = 0) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    if depth > _MAX_BASES:
        raise RecipeError(f"more than {_MAX_BASES} recipes in a chain of `base`", where=str(path))
    tree, marks = _read(path)
    bases = tree.pop("base", [])
    for key in [k for k in marks if k[:1] == ("base",)]:
        del marks[key]
    merged: dict[str, Any] = {}
    merged_marks: dict[KeyPath, str] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        base, base_marks = _load_with_bases(find_recipe(str(name), beside=path.parent), depth + 1)
        merged, merged_marks = _merge(merged, base), {**merged_marks, **base_marks}
    return _merge(merged, tree), {**merged_marks, **marks}


def _apply_override(tree: dict[str, Any], text: str) -> KeyPath:
    key, separator, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise RecipeError(f"'{text}' is not key=value", fix="write it as train.lr=1e-4")
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of '{key}' is not valid YAML: {value}") from error
    here: Any = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            index = int(part) if part.isdecimal() else -1
            if not 0 <= index < len(here):
                raise RecipeError(
                    f"'{key}': a list of {len(here)} has no entry '{part}'",
                    expected=f"0 to {len(here) - 1}",
                )
            if last:
                here[index] = parsed
            here = here[index]
        elif last:
            here[part] = _merge(here.get(part), parsed)
        else:
            if not isinstance(here.get(part), (dict, list)):
                here[part] = {}
            here = here[part]
    return path


def load_recipe(name: str, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Reads, merges and validates a recipe.

    Args:
        name: A .yaml path, or the name of a shipped recipe.
        overrides: `key=value` strings with dotted keys; list entries by number; values as YAML.

    Raises:
        RecipeError: The file cannot be read, a key is unknown or a value does not fit; the message
            names the file and line, or the override, and the nearest known key.
    """
    path = find_recipe(name)
    tree, marks = _load_with_bases(path)
    for text in overrides:
        key = _apply_override(tree, text)
        for below in [k for k in marks if k[: len(key)] == key]:
            del marks[below]
        marks[key] = f"command line ({text})"
    sources = {".".join(key): where for key, where in marks.items()}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Recipe, sources=sources, origin=str(path)) from None
    return ResolvedRecipe(recipe=recipe, sources=sources, origin=str(path))

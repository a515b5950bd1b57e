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
from vistune.recipe.messages import explain, sections_in
from vistune.recipe.schema import Recipe
from vistune.registry import nearest

KeyPath: TypeAlias = tuple[str, ...]
Marks: TypeAlias = dict[KeyPath, str]
"""Where each value was written: "file.yaml:12" or "command line (key=value)"."""
_MAX_SHOWN = 60


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
    """Appends `# origin` to every line of block YAML that ends a value."""
    lines = text.rstrip("\n").split("\n")
    width = min(max(map(len, lines)), 60)
    for key, (_, line) in _positions(yaml.compose(text, Loader=yaml.SafeLoader)).items():
        lines[line] = f"{lines[line]:<{width}}  # {resolved.source_of('.'.join(key))}"
    return "\n".join(lines) + "\n"


def _positions(node: yaml.Node | None, prefix: KeyPath = ()) -> dict[KeyPath, tuple[int, int]]:
    """Returns the first and last line (from 0) of every scalar and empty collection below `node`.

    A quoted text may run over several lines; a comment may only follow the last of them.
    """
    found: dict[KeyPath, tuple[int, int]] = {}
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            found |= _positions(value, (*prefix, str(key.value)))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            found |= _positions(value, (*prefix, str(index)))
    elif node is not None:
        found[prefix] = (node.start_mark.line, node.end_mark.line)
    return found


def _shipped_folder() -> Path:
    return Path(str(resources.files("vistune"))) / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name."""
    folder = _shipped_folder()
    files = sorted(folder.rglob("*.yaml"))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in files}


def find_recipe(name: str, *, beside: Path | None = None, where: str | None = None) -> Path:
    """Returns the file a recipe name means: a path, or the name of a shipped recipe.

    Args:
        name: What was written.
        beside: Folder tried first.
        where: The recipe whose `base` names it, for the message.

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
        where=where,
        expected=(f"did you mean '{close}'? " if close else "") + "known: " + ", ".join(shipped),
        fix="vistune recipe list",
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice, which YAML itself would let the later one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a single word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is written twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _label(path: Path) -> str:
    """Returns how messages call a recipe file; shipped ones without the installation's folder."""
    folder = _shipped_folder()
    if path.is_relative_to(folder):
        return f"shipped {path.relative_to(folder).as_posix()}"
    return str(path)


def _read(path: Path) -> tuple[dict[str, Any], Marks]:
    label = _label(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
        marks = {k: f"{label}:{line + 1}" for k, (line, _) in _positions(node).items()}
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8 text", where=label, got=error) from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=label) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{label}{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=label) from error
    except RecursionError as error:
        raise RecipeError("an alias contains itself", where=label) from error
    if not isinstance(tree, dict):
        found = "an empty file" if tree is None else type(tree).__name__
        raise RecipeError("a recipe is a mapping of keys", where=label, got=found)
    return tree, marks


def _tag_key(path: KeyPath) -> str | None:
    """Returns the key that chooses between forms of the section at `path` (`mode` in `tune.*`)."""
    fields = Recipe.model_fields
    for depth, part in enumerate(path):
        if part not in fields:
            return None
        field = fields[part]
        if depth == len(path) - 1:
            return field.discriminator if isinstance(field.discriminator, str) else None
        sections = sections_in(field.annotation)
        if len(sections) != 1:
            return None
        fields = sections[0].model_fields
    return None


def _merge(
    below: Any, above: Any, path: KeyPath = (), replaced: list[KeyPath] | None = None
) -> Any:
    """Lays `above` over `below`: mappings key by key, everything else whole.

    A section that takes another form (`mode: full` over `mode: lora`) replaces the one below: the
    keys of one form mean nothing in the other.

    Args:
        below: The value so far.
        above: The value that wins.
        path: Where both stand in the recipe.
        replaced: Receives the paths whose value below is gone.
    """
    tag = _tag_key(path)
    is_other_form = (
        isinstance(below, dict)
        and isinstance(above, dict)
        and tag is not None
        and {tag} <= below.keys() & above.keys()
        and below[tag] != above[tag]
    )
    if not (isinstance(below, dict) and isinstance(above, dict)) or is_other_form:
        if replaced is not None:
            replaced.append(path)
        return above
    merged = dict(below)
    for key, value in above.items():
        here = (*path, str(key))
        merged[key] = _merge(below[key], value, here, replaced) if key in below else value
    return merged


def _without(marks: Marks, replaced: Sequence[KeyPath]) -> Marks:
    """Returns the marks that do not lie at or below a replaced path."""
    return {k: v for k, v in marks.items() if not any(k[: len(r)] == r for r in replaced)}


def _load_with_bases(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Marks]:
    if path.resolve() in chain:
        shown = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError("the recipe is a base of itself", where=_label(path), got=shown)
    tree, marks = _read(path)
    where = next((w for k, w in marks.items() if k[:1] == ("base",)), _label(path))
    bases = tree.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError("base names one recipe or a list of recipes", where=where, got=bases)
    marks = {k: v for k, v in marks.items() if k[:1] != ("base",)}
    merged: dict[str, Any] = {}
    merged_marks: Marks = {}
    for name in names:
        found = find_recipe(name, beside=path.parent, where=where)
        base, base_marks = _load_with_bases(found, (*chain, path.resolve()))
        replaced: list[KeyPath] = []
        merged = _merge(merged, base, replaced=replaced)
        merged_marks = {**_without(merged_marks, replaced), **base_marks}
    replaced = []
    merged = _merge(merged, tree, replaced=replaced)
    return merged, {**_without(merged_marks, replaced), **marks}


def _leaves(value: Any, prefix: KeyPath) -> list[KeyPath]:
    """Returns the paths of the values in a parsed override."""
    if isinstance(value, dict) and value:
        return [leaf for k, v in value.items() for leaf in _leaves(v, (*prefix, str(k)))]
    if isinstance(value, list) and value:
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, (*prefix, str(i)))]
    return [prefix]


def _parse_override(text: str) -> tuple[KeyPath, Any]:
    key, separator, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise RecipeError(f"'{text}' is not key=value", fix="write it as train.lr=1e-4")
    if path[0] == "base":
        raise RecipeError(
            "base cannot be set on the command line",
            got=text,
            fix="write a recipe file with this base, and name that file",
        )
    try:
        return path, yaml.load(value, Loader=_UniqueKeyLoader) if value else ""
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of '{key}' is not valid YAML: {value}") from error


def _slot(here: dict[str, Any] | list[Any], part: str, path: KeyPath) -> Any:
    """Returns what `part` of a dotted key means in `here`: a key, or the number of an entry."""
    if isinstance(here, dict):
        return part
    if part.isdecimal() and int(part) < len(here):
        return int(part)
    raise RecipeError(
        f"'{'.'.join(path)}': a list of {len(here)} has no entry '{part}'",
        expected=f"0 to {len(here) - 1}" if here else "the whole list: key=[...]",
    )


def _apply_override(tree: dict[str, Any], marks: Marks, text: str) -> Marks:
    """Sets one `key=value` in `tree`, in place, and returns the marks after it."""
    path, value = _parse_override(text)
    here: Any = tree
    for part in path[:-1]:
        slot = _slot(here, part, path)
        below = here.get(slot) if isinstance(here, dict) else here[slot]
        if not isinstance(below, (dict, list)):
            here[slot] = {}
        here = here[slot]
    slot = _slot(here, path[-1], path)
    replaced: list[KeyPath] = []
    if isinstance(here, dict) and slot == _tag_key(path[:-1]) and here.get(slot, value) != value:
        here.clear()
        here[slot] = value
        replaced.append(path[:-1])
    else:
        below = here.get(slot) if isinstance(here, dict) else here[slot]
        here[slot] = _merge(below, value, path, replaced)
    shown = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    written = dict.fromkeys(_leaves(value, path), f"command line ({shown})")
    return _without(marks, replaced) | written


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
        marks = _apply_override(tree, marks, text)
    sources = {".".join(key): where for key, where in marks.items()}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Recipe, sources=sources, origin=_label(path)) from None
    return ResolvedRecipe(recipe=recipe, sources=sources, origin=_label(path))

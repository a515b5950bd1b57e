"""`vistune recipe`: list, show, check and explain recipes."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.errors import RecipeError

if TYPE_CHECKING:
    from vistune.recipe import ResolvedRecipe

app = typer.Typer(help="List, show, check and explain recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values laid over the recipe: train.lr=1e-4"),
]


class SchemaFormat(StrEnum):
    """Forms of the reference."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes."""
    from vistune.cli.console import print_table
    from vistune.recipe import load_recipe, shipped_recipes

    rows = []
    for name in shipped_recipes():
        try:
            rows.append((name, load_recipe(name).recipe.description))
        except RecipeError as error:
            rows.append((name, f"cannot be read: {error.what}"))
    print_table("", ("recipe", "what it does"), rows)


@app.command()
def show(name: Name, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in and the origin of each value."""
    from vistune.recipe import load_recipe

    text = load_recipe(name, overrides or []).to_yaml(with_sources=True)
    if sys.stdout.isatty():
        _print_coloured(text)
    else:
        print(text, end="")


def _print_coloured(text: str) -> None:
    """Prints annotated YAML: keys in colour, defaults dim, what was set in bold."""
    from rich.text import Text

    from vistune.cli.console import stdout

    shown = Text(no_wrap=True, overflow="ignore")
    for line in text.splitlines():
        body, mark, origin = line.rpartition("  # ")
        if not mark:
            body, origin = line, ""
        is_default = origin == "default"
        shown.append(body, style="" if is_default or not origin else "bold")
        shown.append(f"{mark}{origin}\n", style="dim" if is_default else "cyan")
    shown.highlight_regex(r"(?m)^[ -]*[A-Za-z_]+:(?= |$)", "blue")
    stdout().print(shown, end="")


@app.command()
def check(name: Name, overrides: Overrides = None) -> None:
    """Check that a recipe fits the schema and that the files it names are there."""
    from vistune.recipe import load_recipe

    resolved = load_recipe(name, overrides or [])
    missing = _missing_files(resolved)
    if missing:
        raise RecipeError(
            f"{len(missing)} paths of the recipe do not exist"
            + "".join(f"\n  {m}" for m in missing),
            where=resolved.origin,
            fix="paths are relative to the working directory; set them on the command line, as in"
            " data.train.0.path=FILE",
        )
    print(f"{resolved.origin}: fits the schema, and its files are there")


def _missing_files(resolved: ResolvedRecipe) -> list[str]:
    """Returns the local paths a recipe names that do not exist, with their keys and origins."""
    from vistune.data.formats.paths import files_of
    from vistune.models.hub import in_cache, is_hub_id

    recipe = resolved.recipe
    started = recipe.model.from_checkpoint
    on_hub = started is not None and is_hub_id(started) and in_cache(started, recipe.model.revision)
    named: dict[str, str | None] = {"model.from_checkpoint": None if on_hub else started}
    if recipe.model.vision_tower_aux is not None:
        named["model.vision_tower_aux.path"] = recipe.model.vision_tower_aux.path
    named["model.connector.weights"] = recipe.model.connector.weights
    for index, source in enumerate(recipe.data.train):
        files = files_of(source.path)  # of shards with wildcards, every one
        gone = [str(file) for file in files if not file.exists()] if files else [source.path]
        named[f"data.train.{index}.path"] = gone[0] if gone else None
        named[f"data.train.{index}.images"] = source.images
    for index, image in enumerate(recipe.sample.images):
        named[f"sample.images.{index}"] = image
    # A part may be a hub id, "owner/name"; only what can be nothing but a path is looked for.
    for key, part in (
        ("model.vision_tower.path", recipe.model.vision_tower),
        ("model.language_model.path", recipe.model.language_model),
    ):
        if part is not None and not is_hub_id(part.path):
            named[key] = part.path
    return [
        f"{resolved.source_of(key)}: {key}: {path}"
        for key, path in named.items()
        if path is not None and not Path(path).expanduser().exists()
    ]


@app.command()
def schema(
    key: Annotated[
        str, typer.Argument(help="Only this key and what is below it, such as tune.language.")
    ] = "",
    form: Annotated[
        SchemaFormat, typer.Option("--format", help="json is JSON Schema, for editors.")
    ] = SchemaFormat.TEXT,
) -> None:
    """Explain every recipe key: type, default and meaning."""
    import json

    from vistune.recipe import reference

    if form is SchemaFormat.JSON:
        print(json.dumps(reference.json_schema(), ensure_ascii=False, indent=2))
    elif form is SchemaFormat.MARKDOWN:
        print(reference.markdown(key))
    else:
        _print_reference(key)


def _print_reference(key: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from vistune.cli.console import stdout
    from vistune.recipe import reference

    console = stdout()
    form = None
    for item in reference.references(key):
        if item.form != form and item.form is not None:
            section = item.key.rpartition(".")[0]
            console.print(Text(f"{section} with mode: {item.form}", style="dim"))
        form = item.form
        head = Text()
        head.append(item.key, style="bold blue")
        head.append(f"  {item.type}")
        head.append("  required" if item.default is None else f"  [{item.default}]", style="cyan")
        console.print(head)
        console.print(Padding(Text(item.help), (0, 0, 0, 4), expand=False))

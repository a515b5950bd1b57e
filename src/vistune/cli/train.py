"""`vistune train`: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from vistune.cli.recipe import Name, Overrides


def train(
    name: Name,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard a run that is already in the directory.")
    ] = False,
) -> None:
    """Train: check the data, load the parts, run the steps, write checkpoints."""
    from vistune.errors import RecipeError
    from vistune.recipe import load_recipe

    resolved = load_recipe(name, overrides or [])
    if resume and overwrite:
        raise RecipeError("--resume goes on with a run and --overwrite discards it", fix="give one")
    from vistune.train.loop import train as run

    result = run(resolved, resume=resume, overwrite=overwrite)
    if result.interrupted_by is not None:
        raise typer.Exit(130 if result.interrupted_by == "SIGINT" else 143)

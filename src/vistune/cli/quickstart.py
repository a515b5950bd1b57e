"""`vistune quickstart`: from nothing to a trained, scored model and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values laid over both stages' recipes."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of everything it makes.")
    ] = Path("quickstart"),
    cache: Annotated[
        Path | None, typer.Option(help="Where downloads lie; VISTUNE_CACHE or ~/.cache/vistune.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only the first held-out questions.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train and evaluate again from the start.")
    ] = False,
) -> None:
    """Fetch a small model, teach it to see on this machine, score it and write a report.

    What an earlier start finished is not done again, and what was interrupted goes on.
    """
    from vistune.cli.console import progress_bar
    from vistune.quickstart.run import run_quickstart

    result = run_quickstart(
        output,
        overwrite=overwrite,
        cache=cache,
        overrides=tuple(overrides or ()),
        limit=limit,
        progress=progress_bar,
    )
    if not result.is_complete:
        raise typer.Exit(130)

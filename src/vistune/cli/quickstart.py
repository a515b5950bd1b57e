"""`vistune quickstart`: from nothing to a trained, scored model and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of everything it makes.")
    ] = Path("quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train and evaluate again from the start.")
    ] = False,
) -> None:
    """Fetch a small model, teach it to see on this machine, score it and write a report."""
    from vistune.quickstart.run import run_quickstart

    run_quickstart(output, overwrite=overwrite)

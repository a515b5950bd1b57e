"""`vistune compare`: the model here against the numbers of another implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Compare the models here with the numbers of other implementations.",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Keeps `parity` a word of its own: a group of one command would swallow it."""


@app.command("parity")
def parity(
    directory: Annotated[
        Path, typer.Argument(help="config.json, weights by their public names, and io*.npz.")
    ],
    tolerance: Annotated[
        float, typer.Option(help="Largest error, relative to the largest value of an array.")
    ] = 2e-5,
) -> None:
    """Compute every array of a reference dump and say how far each one is off."""
    from vistune.cli.console import print_table
    from vistune.compare import compare_directory

    report = compare_directory(directory, tolerance=tolerance)
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [
        (c.file, c.array, c.note, words[c.passed], "" if c.error is None else f"{c.error:.1e}")
        for c in report.checks
    ]
    print_table(f"{report.model}: {directory}", ("file", "array", "", "result", "error"), rows)
    worst = max((c.error for c in report.compared if c.error is not None), default=0.0)
    num_left = len(report.checks) - len(report.compared)
    print(
        f"{len(report.compared) - len(report.failed)} of {len(report.compared)} arrays pass at"
        f" {tolerance:g}, largest error {worst:.1e}; {num_left} are inputs or not compared"
    )
    if report.failed:
        raise typer.Exit(1)

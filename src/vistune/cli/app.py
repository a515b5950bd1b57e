"""The command `vistune`: its verbs, and how an error becomes a message and an exit code.

Exit codes: 0 done; 1 a defect of ours (traceback) or a failed check; 2 something the user can mend;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vistune._version import __version__
from vistune.cli import (
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    plan,
    quickstart,
    recipe,
    train,
)
from vistune.errors import VistuneError

DEBUG_VARIABLE = "VISTUNE_DEBUG"

app = typer.Typer(
    name="vistune",
    help="Give a language model eyes: build, tune, evaluate and serve vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.add_typer(recipe.app, name="recipe")
app.add_typer(data.app, name="data")
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.add_typer(compare.app, name="compare")
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vistune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also: VISTUNE_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        # The environment reaches worker processes too.
        os.environ[DEBUG_VARIABLE] = "1"


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that cannot show a character shows a mark in its place instead of
        # ending the run.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # Threads that spin while they wait starve each other as soon as cores are shared. OpenMP reads
    # this when torch is loaded. Tokens/s of the quick start's stage 2 on two cores, idle and beside
    # two busy processes: spinning 1590 and 244, this 1420 and 639, not spinning 1290 and 588.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except VistuneError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        from vistune.cli.console import print_error

        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

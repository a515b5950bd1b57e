"""`vistune data`: check datasets before a run does."""

from __future__ import annotations

import typer

app = typer.Typer(help="Check datasets before training.", no_args_is_help=True)

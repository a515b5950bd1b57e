"""The command line: one file per verb. Heavy imports happen inside the verbs, not here."""

from vistune.cli.app import main

__all__ = ["main"]

"""Training: the loop, its step, loss, optimizer, schedule and hooks.

Importing this package imports nothing heavy; `train` brings in torch and transformers when called.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from vistune.recipe import ResolvedRecipe
    from vistune.train.fit import TrainResult

__all__ = ["collector_paused", "train"]


def train(
    resolved: ResolvedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains what a recipe describes. See `vistune.train.loop.train`."""
    with collector_paused():
        from vistune.train import loop
    return loop.train(resolved, resume=resume, overwrite=overwrite, console=console)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python's cycle collector from running.

    Importing torch and transformers makes millions of objects and no garbage, and the collector
    walks them again and again: a quarter of the import's CPU time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Settles what a recipe leaves to the device's memory, before the data is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from vistune.checkpoint.files import write_errors_explained
from vistune.device import Device
from vistune.device.peak import free_memory_gib
from vistune.errors import ModelError
from vistune.recipe import Recipe
from vistune.train.opening import OpenRun
from vistune.types import Batch

if TYPE_CHECKING:
    from vistune.assembly import Blueprint
    from vistune.models.budget import Room


def is_open(recipe: Recipe) -> bool:
    """Whether a recipe leaves row length or recomputed layers to the device's memory."""
    return "auto" in (recipe.batch.max_tokens, recipe.train.checkpoint_layers)


def settled(
    recipe: Recipe, blueprint: Blueprint, device: Device, opened: OpenRun, console: Console
) -> Recipe:
    """Puts numbers in place of `auto`; a resumed run keeps its row length, which is its data.

    Raises:
        ModelError: The model's memory cannot be predicted.
    """
    if not is_open(recipe):
        return recipe
    file = opened.directory.settled
    if opened.checkpoint is not None and file.is_file() and recipe.batch.max_tokens == "auto":
        before = json.loads(file.read_text(encoding="utf-8"))
        update = {"max_tokens": int(before["batch.max_tokens"])}
        recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update=update)})
    room = _room(recipe, blueprint, device, memory_gib=free_memory_gib(device))
    chosen = room.settle(recipe)
    if chosen.said:
        console.print("planned: " + ", ".join(chosen.said), soft_wrap=True, highlight=False)
    if not chosen.fits:
        console.print("[yellow]planned:[/] more than the device has is predicted", soft_wrap=True)
    values = {
        "batch.max_tokens": chosen.max_tokens,
        "train.checkpoint_layers": chosen.checkpoint_layers,
    }
    with write_errors_explained(file):
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return chosen.apply(recipe)


def adviser(
    recipe: Recipe, blueprint: Blueprint, device: Device
) -> Callable[[Sequence[Batch]], str]:
    """Returns what names the setting that would fit, should rows run out of memory.

    Args:
        recipe: Settled.
        blueprint: The model.
        device: Asked now for its free memory, before the model is on it.
    """
    memory_gib = free_memory_gib(device)

    def advise(rows: Sequence[Batch]) -> str:
        try:
            room = _room(recipe, blueprint, device, memory_gib=memory_gib)
        except ModelError:
            return "This model's memory cannot be predicted"
        tried = recipe.train.checkpoint_layers
        assert tried != "auto", "it was settled before"
        return room.advice(rows, tried_layers=tried)

    return advise


def _room(recipe: Recipe, blueprint: Blueprint, device: Device, *, memory_gib: float) -> Room:
    from vistune.models.budget import Room

    return Room.of(
        recipe,
        blueprint.parts,
        blueprint.facts,
        dtype=device.dtype,
        kind=device.kind,
        memory_gib=memory_gib,
    )

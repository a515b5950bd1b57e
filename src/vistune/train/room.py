"""Settles what a recipe leaves to the device's memory, before the data is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console

from vistune.checkpoint.files import write_errors_explained
from vistune.device import Device
from vistune.device.peak import free_memory_gib
from vistune.recipe import Recipe
from vistune.train.opening import OpenRun

if TYPE_CHECKING:
    from vistune.assembly import Blueprint
    from vistune.models.budget import Room


def room_of(recipe: Recipe, blueprint: Blueprint, device: Device) -> Room | None:
    """Works out memory where something has to be chosen from it, or can run out."""
    open_keys = "auto" in (recipe.batch.max_tokens, recipe.train.checkpoint_layers)
    if device.kind == "cpu" and not open_keys:
        return None
    from vistune.models.budget import Room

    return Room.of(
        recipe,
        blueprint.parts,
        blueprint.facts,
        dtype=device.dtype,
        kind=device.kind,
        memory_gib=free_memory_gib(device),
        required=open_keys,
    )


def settled(recipe: Recipe, room: Room | None, opened: OpenRun, console: Console) -> Recipe:
    """Puts numbers in place of `auto`; a resumed run keeps its row length, which is its data."""
    if room is None or "auto" not in (recipe.batch.max_tokens, recipe.train.checkpoint_layers):
        return recipe
    file = opened.directory.settled
    if opened.checkpoint is not None and file.is_file() and recipe.batch.max_tokens == "auto":
        before = json.loads(file.read_text(encoding="utf-8"))
        update = {"max_tokens": int(before["batch.max_tokens"])}
        recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update=update)})
    chosen = room.settle(recipe)
    if chosen.said:
        console.print("planned: " + ", ".join(chosen.said), soft_wrap=True, highlight=False)
    values = {
        "batch.max_tokens": chosen.max_tokens,
        "train.checkpoint_layers": chosen.checkpoint_layers,
    }
    with write_errors_explained(file):
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return chosen.apply(recipe)

"""Activation checkpointing as a dial in layers. Nothing is recomputed unless it is turned."""

from __future__ import annotations

from typing import Literal

from torch import nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.contract import TunableModel
from vistune.models.offload import InputStore
from vistune.types import RoleName

_KEYS: dict[RoleName, str] = {
    "language": "train.checkpoint_layers",
    "vision": "train.checkpoint_tower_layers",
}


def set_checkpoint_layers(
    model: TunableModel,
    num_layers: int,
    *,
    role: Literal["language", "vision"] = "language",
    store: InputStore | None = None,
) -> None:
    """Makes the first layers of a role recompute their activations in the backward pass.

    Args:
        model: The model; it must be in training mode for this to have an effect.
        num_layers: How many, from the first layer on; 0 turns it off.
        role: The decoder's layers, or the tower's blocks.
        store: Where the inputs of these layers wait; on the device when None.

    Raises:
        ModelError: There are fewer layers, or they cannot be recomputed.
    """
    layers, key = layers_of(model, role), _KEYS[role]
    if num_layers > len(layers):
        what = "language model" if role == "language" else "vision tower"
        raise ModelError(
            f"the {what} has {len(layers)} layers",
            where=key,
            got=str(num_layers),
            expected=f"0 to {len(layers)}",
        )
    for index, layer in enumerate(layers):
        on, keeping = index < num_layers, None if store is None else store.moving
        if not _compat.set_recompute(layer, on=on, keeping=keeping) and on:
            raise ModelError(
                f"{type(layer).__name__} cannot recompute its activations",
                where=key,
                fix=f"set {key}=0",
            )


def decoder_layers(model: TunableModel) -> list[nn.Module]:
    """Returns the language model's layers, in order.

    Args:
        model: Any model with roles.
    """
    return layers_of(model, "language")


def layers_of(model: TunableModel, role: RoleName) -> list[nn.Module]:
    """Returns the layers of a role, in order: the largest list of modules it has.

    Args:
        model: Any model with roles.
        role: The role.
    """
    module_map = model.module_map
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in module_map.prefixes(role))
    lists = [
        list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and f"{name}.".startswith(prefixes)
        and module_map.role_of(f"{name}.0") == role
    ]

    # A layer may hold lists of its own (experts), which are smaller than the stack.
    def num_parameters(layers: list[nn.Module]) -> int:
        return sum(p.numel() for layer in layers for p in layer.parameters())

    return max(lists, key=num_parameters, default=[])

"""What a model holds on a device whatever its rows are: weights, gradients, optimizer. Exact.

For models whose activations are not predicted (transformers' own vision-language models): a number
that is not known is left out, not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from vistune.models.budget import usable_bytes
from vistune.models.memory import frozen_bytes
from vistune.models.native import NativeVLM, native_skeleton
from vistune.models.tune import apply_tuning
from vistune.models.tune.quantize import QUANTISED_ROLES
from vistune.plan.devices import KnownDevice
from vistune.recipe import Recipe, TuneConfig
from vistune.recipe.schema import FrozenFormat
from vistune.recipe.sizes import resident_optimizer_bytes
from vistune.types import ROLES, RoleName

if TYPE_CHECKING:
    from vistune.models.facts import ModelFacts


@dataclass(frozen=True)
class RoleHeld:
    """Bytes that one role holds.

    Args:
        weights: Of its weights, each in the format it is held in.
        gradients: Of its gradients.
        optimizer: Of the optimizer's state on the device.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Held:
    """What a model holds on a device.

    Args:
        device: The device.
        roles: Bytes by role.
        num_parameters: Weights of the model, adapters included.
        num_trainable: Of them, how many train.
    """

    device: KnownDevice
    roles: dict[RoleName, RoleHeld]
    num_parameters: int
    num_trainable: int

    @property
    def total(self) -> int:
        """All bytes, gradients included."""
        return sum(r.weights + r.gradients + r.optimizer for r in self.roles.values())

    @property
    def can_fit(self) -> bool:
        """Whether they leave anything for activations."""
        return self.total < usable_bytes(self.device.memory_gib)


def held(recipe: Recipe, facts: ModelFacts, device: KnownDevice, *, dtype: torch.dtype) -> Held:
    """Adds up what one of transformers' own models holds under a recipe; reads no weights.

    Args:
        recipe: What trains, and the optimizer.
        facts: The model.
        device: The device.
        dtype: Format of frozen weights.

    Raises:
        ModelError: A role cannot train in the way asked for.
    """
    with torch.device("meta"):
        model = native_skeleton(facts).to(dtype)
        apply_tuning(model, recipe.tune, seed=0)
    compact = _compact(model, recipe.tune)
    roles = {role: RoleHeld() for role in ROLES}
    for name, parameter in model.named_parameters():
        role, count = model.module_map.role_of(name), parameter.numel()
        before = roles[role]
        if parameter.requires_grad:
            roles[role] = RoleHeld(
                before.weights + 4 * count,
                before.gradients + 4 * count,
                before.optimizer + resident_optimizer_bytes(count, recipe.train),
            )
            continue
        weights = frozen_bytes(parameter, compact.get(id(parameter), "same"))
        roles[role] = replace(before, weights=before.weights + weights)
    parameters = list(model.parameters())
    return Held(
        device=device,
        roles=roles,
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def _compact(model: NativeVLM, tune: TuneConfig) -> dict[int, FrozenFormat]:
    """Returns how the weights are held that `models.tune.quantize` may hold in fewer bits."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        id(module.weight): tune.held_format(role)
        for role in QUANTISED_ROLES
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and model.module_map.role_of(name) == role
        and ".lora_" not in name
        and not any(p.requires_grad for p in module.parameters(recurse=False))
        and id(module.weight) not in tables
    }

"""What a model holds on a device whatever its rows are: weights, gradients, optimizer. Exact.

For models whose activations are not predicted (`models.native_memory.why_not_predicted`): a number
that is not known is left out, not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vistune.models.budget import usable_bytes
from vistune.models.memory import RoleBytes
from vistune.models.native import native_skeleton
from vistune.models.native_weights import role_bytes
from vistune.models.tune import apply_tuning
from vistune.plan.devices import KnownDevice
from vistune.recipe import Recipe
from vistune.types import RoleName

if TYPE_CHECKING:
    from vistune.models.facts import ModelFacts


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
    roles: dict[RoleName, RoleBytes]
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
    found = role_bytes(model, tune=recipe.tune, train=recipe.train, dtype=dtype)
    parameters = list(model.parameters())
    return Held(
        device=device,
        roles=found,
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )

"""Training mode, set from outside on a model's modules by role.

Frozen roles stay in evaluation mode: their dropout would only add noise, and batch-norm statistics
would drift although nothing trains.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from vistune.recipe import TuneConfig
from vistune.types import ROLES, RoleName


class RoleMap(Protocol):
    """Role -> module paths (see `models.contract.ModuleMap`)."""

    def prefixes(self, role: RoleName) -> tuple[str, ...]:
        """Returns the paths of a role's modules."""
        ...


def set_training_mode(model: nn.Module, tune: TuneConfig, module_map: RoleMap) -> None:
    """Puts what trains in training mode and every frozen role in evaluation mode.

    Args:
        model: The model.
        tune: What trains.
        module_map: Role -> paths of its modules.
    """
    model.train()
    named = dict(model.named_modules())
    modes = {role: dict(tune)[role].mode for role in ROLES}
    # Outer modules first: a head inside a frozen language model still follows its own mode.
    paths = sorted((path.rstrip("."), role) for role in ROLES for path in module_map.prefixes(role))
    for path, role in paths:
        if path in named:
            named[path].train(modes[role] != "freeze")


def let_layers_recompute(model: nn.Module) -> None:
    """Marks layers that recompute their activations as training, whatever the mode of their role.

    transformers recomputes only in layers whose own flag says training. In a frozen language model
    it would silently keep every activation; what is inside the layer keeps the mode of its role.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True

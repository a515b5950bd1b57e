"""Training mode by role: `models.modes`, under the name that training knows it by."""

from __future__ import annotations

from vistune.models.modes import RoleMap, let_layers_recompute, set_training_mode

__all__ = ["RoleMap", "let_layers_recompute", "set_training_mode"]

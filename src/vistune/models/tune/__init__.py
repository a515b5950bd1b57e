"""What of a model trains: freezing, full training and adapters, role by role."""

from vistune.models.tune.plan import (
    ParamGroup,
    Tuning,
    apply_tuning,
    load_trainable,
    trainable_state,
)

__all__ = ["ParamGroup", "Tuning", "apply_tuning", "load_trainable", "trainable_state"]

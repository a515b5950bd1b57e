"""Builds and loads a vision tower: the part of an encoder that a plan uses."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from vistune.errors import MissingExtraError
from vistune.models.towers.families import TowerPlan, drop_unused
from vistune.models.weights import LoadReport, load_strictly
from vistune.recipe import VisionTowerConfig


def tower_class(plan: TowerPlan) -> Any:
    """Returns the class of a plan's encoder.

    Raises:
        MissingExtraError: It needs a package that is not installed.
    """
    name = plan.traits.model_class
    if name is None:
        from vistune.models.towers.efficientnet_lite import EfficientNetLiteModel

        return EfficientNetLiteModel
    if name == "TimmWrapperModel":
        try:
            import timm  # noqa: F401
        except ImportError:
            raise MissingExtraError.of(
                "timm", extra="timm", purpose="a timm vision tower"
            ) from None
    import transformers

    return getattr(transformers, name)


def build_tower(config: Any, plan: TowerPlan) -> nn.Module:
    """Builds a tower with fresh weights, ready to take those of a saved model.

    Args:
        config: The cut config of the encoder.
        plan: Its plan.
    """
    tower = tower_class(plan)(config, **dict(plan.traits.model_kwargs))
    assert isinstance(tower, nn.Module)
    drop_unused(tower, plan)
    return tower


def load_tower(
    config: VisionTowerConfig, vision_config: Any, plan: TowerPlan, *, dtype: torch.dtype
) -> tuple[nn.Module, LoadReport]:
    """Loads a tower from an encoder's directory; layers behind the one taken are left out.

    Args:
        config: Where it is.
        vision_config: The cut config of the encoder.
        plan: Its plan.
        dtype: Format of the weights.

    Returns:
        The tower in evaluation mode, and what was loaded.

    Raises:
        WeightsError: Weights are missing, unexpected or of another shape.
    """
    family = plan.traits
    tower, report = load_strictly(
        tower_class(plan),
        config.path,
        key="model.vision_tower.path",
        dtype=dtype,
        revision=config.revision,
        harmless=lambda key: is_left_out(key, vision_config, plan),
        optional=lambda key: _is_unused(key, plan),
        config=vision_config,
        **dict(family.model_kwargs),
    )
    assert isinstance(tower, nn.Module)
    drop_unused(tower, plan)
    return tower, report


def is_left_out(key: str, vision_config: Any, plan: TowerPlan) -> bool:
    """Whether a weight of an encoder's checkpoint is known and not used by the plan.

    Args:
        key: Its name, as in the encoder alone.
        vision_config: The cut config.
        plan: The plan.
    """
    if not {"position_ids", "mask_token"}.isdisjoint(key.split(".")):
        return True
    foreign = any(key.startswith(prefix) for prefix in plan.traits.foreign_keys)
    return foreign or _is_unused(key, plan) or _is_cut_layer(key, vision_config, plan)


def _is_unused(key: str, plan: TowerPlan) -> bool:
    norm = plan.traits.final_norm
    in_norm = norm is not None and not plan.normalised and key.startswith(norm + ".")
    return in_norm or key in plan.traits.never_reached


def _is_cut_layer(key: str, vision_config: Any, plan: TowerPlan) -> bool:
    """Whether a weight belongs to a layer (or stage) behind the last one that is built."""
    kind = plan.traits.layers
    if kind is None:
        return False
    lists = ("layers", "layer") if kind == "blocks" else ("stages",)
    kept = int(vision_config.num_hidden_layers) if kind == "blocks" else len(vision_config.depths)
    parts = key.split(".")
    return any(
        name in lists and number.isdigit() and int(number) >= kept
        for name, number in itertools.pairwise(parts)
    )

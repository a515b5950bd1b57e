"""MGM-2B and MGM-2B-HD: recognised by their tensors' names, sizes read off their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistune.models.families.contract import FAMILIES
from vistune.models.families.files import (
    CONFIG_NAME,
    read_config,
    read_tensors,
    tensor_shapes,
)
from vistune.models.families.filling import filled
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class MGMFamily:
    """MGM on Gemma.

    Args:
        name: The exact name users write.
        cuts: Whether pictures are cut into crops (the HD models).
    """

    name: str
    cuts: bool

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether names and settings are this MGM's.

        The head is tied in Gemma only; the same towers on Llama have one of their own.
        """
        towers = {
            "model.vision_tower_aux.vision_stem.0.weight",
            "model.vlm_uni_query_projector.0.weight",
        }
        cuts = int(config.get("image_grid", 1)) > 1
        return towers <= keys and _HEAD not in keys and cuts == self.cuts

    def settings(self, directory: Path) -> MGMConfig:
        """Returns the config of a model directory, sizes read off its tensors' shapes."""
        return MGMConfig.from_public(
            read_config(directory), tensor_shapes(directory), where=str(directory / CONFIG_NAME)
        )

    def load(self, directory: Path, dtype: torch.dtype) -> MGMForConditionalGeneration:
        """Loads a model directory, both towers among its weights.

        Args:
            directory: In MGM's layout.
            dtype: Number format of the weights.

        Raises:
            ModelError: The config does not describe an MGM on Gemma.
            WeightsError: A tensor is missing, left over or of another shape.
        """
        tensors = dict(read_tensors(directory))
        config = MGMConfig.from_public(
            read_config(directory),
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            where=str(directory / CONFIG_NAME),
        )
        own = mgm_map(config).from_public(tensors, where=str(directory))
        model = filled(MGMForConditionalGeneration, config, own, dtype, where=str(directory))
        assert isinstance(model, MGMForConditionalGeneration)
        return model


for _family in (MGMFamily("mgm-2b", cuts=False), MGMFamily("mgm-2b-hd", cuts=True)):
    FAMILIES.register(_family.name)(_family)

"""MGM-2B and MGM-2B-HD: recognised by their tensors' names, sizes read off their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistune.errors import WeightsError
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

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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

        The head is tied in Gemma only; the same towers on Llama have one of their own. Files that
        were not written as safetensors hold a tied head all the same; there the config says it.
        """
        # By groups of names: a single one that is missing shall be named, not hide the family.
        tower = any(key.startswith("model.vision_tower_aux.") for key in keys)
        mining = any(key.startswith("model.vlm_uni_") for key in keys)
        named = (config.get("model_type"), *(config.get("architectures") or ()))
        on_gemma = _HEAD not in keys or bool({"mgm_gemma", "MGMGemmaForCausalLM"} & set(named))
        cuts = int(config.get("image_grid", 1)) > 1
        return tower and mining and on_gemma and cuts == self.cuts

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
        head = tensors.pop(_HEAD, None)
        if head is not None and not torch.equal(head, tensors.get(_EMBEDDING, head[:0])):
            raise WeightsError(
                "the head is not the embedding, to which Gemma's is tied",
                where=str(directory),
                got=f"{_HEAD} {tuple(head.shape)}",
                expected=f"what {_EMBEDDING} holds, or no {_HEAD}",
            )
        key_map = mgm_map(config)
        own = key_map.from_public(tensors, where=str(directory))
        model = filled(
            MGMForConditionalGeneration,
            config,
            own,
            dtype,
            where=str(directory),
            public=key_map.public_names(),
        )
        assert isinstance(model, MGMForConditionalGeneration)
        return model


for _family in (MGMFamily("mgm-2b", cuts=False), MGMFamily("mgm-2b-hd", cuts=True)):
    FAMILIES.register(_family.name)(_family)

"""Models of the families: in their public layouts, and in vistune's own.

A public directory is recognised by its config and its tensors' names. Vistune's own says which
family it is in `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration
from vistune.models.facts import ModelFacts
from vistune.models.families import FAMILIES, Family, detect
from vistune.models.families.describe import FamilyConfig, facts_of
from vistune.models.families.visualglm import (
    VisualGLMFamily,
    is_sat,
    read_sat_config,
    read_sat_tensors,
)
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.visualglm import VisualGLMConfig, VisualGLMForConditionalGeneration
from vistune.models.weights import load_strictly
from vistune.models.whole import FamilyModel

_KEY = "model.from_checkpoint"
_Classes: TypeAlias = tuple[type[Any], type[Any]]
_OWN: dict[str, _Classes] = {
    CogVLM2Config.model_type: (CogVLM2Config, CogVLM2ForConditionalGeneration),
    MGMConfig.model_type: (MGMConfig, MGMForConditionalGeneration),
    VisualGLMConfig.model_type: (VisualGLMConfig, VisualGLMForConditionalGeneration),
}


@dataclass(frozen=True)
class OwnLayout:
    """Vistune's own directory of a family's model.

    Args:
        model_type: What its config calls it.
    """

    model_type: str

    def describe(self, folder: Path) -> ModelFacts:
        """Reads config and tokenizer."""
        config_class, _ = _OWN[self.model_type]
        return facts_of(config_class.from_pretrained(folder), folder)

    def load(self, folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> FamilyModel:
        """Loads the model, every weight accounted for."""
        _, model_class = _OWN[self.model_type]
        model, _ = load_strictly(model_class, str(folder), key=_KEY, dtype=dtype)
        return cast(FamilyModel, model)


@dataclass(frozen=True)
class PublicLayout:
    """A family's public directory.

    Args:
        family: The family.
    """

    family: Family

    def describe(self, folder: Path) -> ModelFacts:
        """Reads config, shapes of tensors and tokenizer."""
        return facts_of(cast(FamilyConfig, self.family.settings(folder)), folder)

    def load(self, folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> FamilyModel:
        """Loads the model, every weight accounted for."""
        return cast(FamilyModel, self.family.load(folder, dtype))


def own_layout(values: dict[str, Any]) -> OwnLayout | None:
    """Returns vistune's own layout of a family, or None for another config."""
    model_type = str(values.get("model_type"))
    return OwnLayout(model_type) if model_type in _OWN else None


def public_layout(folder: Path) -> PublicLayout | None:
    """Returns the public layout of a directory that holds a family's model, else None.

    Raises:
        WeightsError: A weight file is missing or damaged.
    """
    if is_sat(folder):
        family, keys = VisualGLMFamily(), _sat_names(folder)
        return PublicLayout(family) if family.matches(read_sat_config(folder), keys) else None
    found = detect(folder, FAMILIES)
    return None if found is None else PublicLayout(found)


def _sat_names(folder: Path) -> frozenset[str]:
    tensors: dict[str, Tensor] = read_sat_tensors(folder)  # mapped from the file, not read
    return frozenset(tensors)

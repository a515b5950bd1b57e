"""What a family of public models is: a name, how to recognise it, how to load it.

A family is recognised by its config and its tensors' names, never by the name of a folder. This
module holds the contract and the two registries; the families themselves stand in the files
beside it, and `vistune.models.families` fills the registries.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedConfig

from vistune.models.families.files import read_config, tensor_names
from vistune.models.keymap import KeyMap
from vistune.registry import Registry


class Family(Protocol):
    """One public model family.

    Args:
        name: The exact name users write, such as "cogvlm2".
    """

    @property
    def name(self) -> str:
        """The exact name users write."""
        ...

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether a model directory holds this family.

        Args:
            config: The directory's `config.json`.
            keys: The names of its tensors.
        """
        ...

    def settings(self, directory: Path) -> PreTrainedConfig:
        """Returns the config of the model that `load` builds; no weight is read.

        Args:
            directory: A model directory in the public layout.

        Raises:
            ModelError: The config does not describe this family.
        """
        ...

    def load(self, directory: Path, dtype: torch.dtype) -> torch.nn.Module:
        """Loads the model of a directory, every tensor accounted for.

        Args:
            directory: A model directory in the public layout.
            dtype: Number format of the weights.

        Raises:
            ModelError: The config does not describe this family.
            WeightsError: A tensor is missing, left over or of another shape.
        """
        ...


class LanguageFamily(Family, Protocol):
    """A family of language models, which become part of a composed model."""

    @property
    def reads_pieces(self) -> bool:
        """Whether its tokenizer's class is remote code, so that its own files are read instead."""
        ...

    def key_map(self, config: PreTrainedConfig) -> KeyMap:
        """Returns the table of names, the family's to those of the model that `load` builds.

        Args:
            config: That model's config.
        """
        ...

    def transformers_config(self, config: Mapping[str, Any]) -> PreTrainedConfig:
        """Returns the config of the transformers model that `load` builds; no weight is read.

        Args:
            config: The directory's `config.json`.

        Raises:
            ModelError: The config asks for something the family has no form for.
        """
        ...


FAMILIES: Registry[Family] = Registry("model family")
"""Whole vision-language models: `load` returns a `VisionLanguageModel`."""

LANGUAGE_FAMILIES: Registry[LanguageFamily] = Registry("language model family")
"""Language models that transformers has no class for: `load` returns a causal language model."""

FamilyT = TypeVar("FamilyT", bound=Family)


def detect(directory: Path, families: Registry[FamilyT]) -> FamilyT | None:
    """Returns the family that a model directory holds, or None where none of them fits.

    Args:
        directory: A model directory; its config and its tensors' names are read, no weight is.
        families: `FAMILIES` or `LANGUAGE_FAMILIES`.

    Raises:
        ModelError: The config cannot be read.
        WeightsError: A weight file is missing or damaged.
    """
    config, keys = read_config(directory), tensor_names(directory)
    found = [families.get(name) for name in families if families.get(name).matches(config, keys)]
    assert len(found) <= 1, f"several families claim one model: {[f.name for f in found]}"
    return found[0] if found else None

"""The language model of an original LLaVA, where something else stands on it: LoRA of a task.

LLaVA's own fine-tuning on a task leaves adapters that name a whole LLaVA as their base. Of that
base only the language model is taken; projector and adapters come from what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedConfig

from vistune.models.families.contract import LANGUAGE_FAMILIES
from vistune.models.families.files import read_config, read_tensors
from vistune.models.families.filling import filled
from vistune.models.keymap import Entry, KeyMap
from vistune.models.language.llava import (
    PROJECTOR,
    is_of_language_model,
    is_original_llava,
    llava_text_config,
)
from vistune.models.language.rotary import settle_rotary

_COMPUTED = ".rotary_emb.inv_freq"
_CLASSES = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}


class LlavaLanguageFamily:
    """Llama or Mistral inside an original LLaVA."""

    name = "llava-language"
    reads_pieces = False

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether a model directory holds this family; see `Family.matches`."""
        return is_original_llava(config) and any(key.startswith(PROJECTOR) for key in keys)

    def settings(self, directory: Path) -> PreTrainedConfig:
        """Returns the language model's config of a directory."""
        return self.transformers_config(read_config(directory))

    def load(self, directory: Path, dtype: torch.dtype) -> torch.nn.Module:
        """Loads the language model of a directory, every tensor of it accounted for.

        Args:
            directory: An original LLaVA.
            dtype: Number format of the weights.

        Raises:
            ModelError: The config is of something else.
            WeightsError: A tensor is missing, left over or of another shape.
        """
        config = self.settings(directory)
        tensors = {
            name: tensor
            for name, tensor in read_tensors(directory)
            if is_of_language_model(name) and not name.endswith(_COMPUTED)
        }
        kind = _CLASSES[config.model_type]
        model = filled(kind, config, tensors, dtype, where=str(directory))
        settle_rotary(model)
        return model

    def key_map(self, config: PreTrainedConfig) -> KeyMap:
        """Returns the table of names: they are the language model's own."""
        with torch.device("meta"):
            names = _CLASSES[config.model_type](config).state_dict()
        return KeyMap("LLaVA", tuple(Entry(name, (name,)) for name in names))

    def transformers_config(self, config: Mapping[str, Any]) -> PreTrainedConfig:
        """Returns the language model's config; see `llava_text_config`."""
        found = llava_text_config(config)
        assert isinstance(found, PreTrainedConfig)
        return found


LANGUAGE_FAMILIES.register(LlavaLanguageFamily.name)(LlavaLanguageFamily())

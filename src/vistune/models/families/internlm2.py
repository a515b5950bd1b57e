"""InternLM2 as a family of language models: recognised by its fused projection, loaded as Llama."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.models.families.contract import LANGUAGE_FAMILIES
from vistune.models.language.internlm2 import (
    MODEL_TYPE,
    internlm2_to_llama_config,
    load_internlm2,
)


class InternLM2Family:
    """InternLM2, base and chat."""

    name = "internlm2"

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether a model directory holds this family; see `Family.matches`."""
        return config.get("model_type", MODEL_TYPE) == MODEL_TYPE and {
            "model.tok_embeddings.weight",
            "model.layers.0.attention.wqkv.weight",
            "output.weight",
        } <= set(keys)

    def load(self, directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
        """Loads a public directory; see `load_internlm2`."""
        return load_internlm2(directory, dtype)

    def transformers_config(self, config: Mapping[str, Any]) -> LlamaConfig:
        """Returns the Llama config; see `internlm2_to_llama_config`."""
        return internlm2_to_llama_config(config)


LANGUAGE_FAMILIES.register(InternLM2Family.name)(InternLM2Family())

"""InternLM2 as a family of language models: recognised by its fused projection, loaded as Llama."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.models.families.contract import LANGUAGE_FAMILIES
from vistune.models.families.files import built_on_meta, fill, read_config, read_tensors
from vistune.models.keymap import KeyMap
from vistune.models.language.internlm2 import (
    MODEL_TYPE,
    internlm2_keys,
    internlm2_to_llama_config,
)
from vistune.models.language.rotary import settle_rotary


def load_internlm2(directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """Loads a public InternLM2 directory as a Llama, every tensor accounted for.

    Args:
        directory: `config.json` and weight files.
        dtype: Number format of the weights.

    Raises:
        ModelError: See `internlm2_to_llama_config`.
        WeightsError: A tensor is missing, left over or of another shape.
    """
    config = internlm2_to_llama_config(read_config(directory))
    model = built_on_meta(lambda: LlamaForCausalLM(config))
    public = {name: tensor.to(dtype) for name, tensor in read_tensors(directory)}
    where, keys = str(directory), internlm2_keys(config)
    fill(model, keys.from_public(public, where=where), where=where, public=keys.public_names())
    # Its tables are no weights, so they are still without memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    settle_rotary(model)
    return model.eval()


class InternLM2Family:
    """InternLM2, base and chat."""

    name = "internlm2"
    reads_pieces = True

    def matches(self, config: Mapping[str, Any], keys: Set[str]) -> bool:
        """Says whether a model directory holds this family; see `Family.matches`."""
        return config.get("model_type", MODEL_TYPE) == MODEL_TYPE and any(
            key.startswith("model.layers.") and key.endswith(".attention.wqkv.weight")
            for key in keys
        )

    def settings(self, directory: Path) -> LlamaConfig:
        """Returns the Llama config of a public directory; see `internlm2_to_llama_config`."""
        return internlm2_to_llama_config(read_config(directory))

    def load(self, directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
        """Loads a public directory; see `load_internlm2`."""
        return load_internlm2(directory, dtype)

    def key_map(self, config: LlamaConfig) -> KeyMap:
        """Returns the table of names; see `internlm2_keys`."""
        return internlm2_keys(config)

    def transformers_config(self, config: Mapping[str, Any]) -> LlamaConfig:
        """Returns the Llama config; see `internlm2_to_llama_config`."""
        return internlm2_to_llama_config(config)


LANGUAGE_FAMILIES.register(InternLM2Family.name)(InternLM2Family())

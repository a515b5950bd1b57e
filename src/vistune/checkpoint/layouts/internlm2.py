"""The public InternLM2 layout, written: a Llama's tensors under InternLM2's names, fused again.

The table of names stands in `vistune.models.language.internlm2`, reading in
`vistune.models.families.internlm2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vistune.models.families.files import CONFIG_NAME
from vistune.models.language.internlm2 import internlm2_keys, llama_to_internlm2_config


def to_public(
    tensors: Mapping[str, Tensor], config: LlamaConfig, *, where: str
) -> dict[str, Tensor]:
    """Returns a Llama state dict in the public InternLM2 layout.

    Args:
        tensors: State dict of `LlamaForCausalLM`, adapters merged.
        config: Its config.
        where: What is written, for messages.

    Raises:
        WeightsError: A tensor is missing or left over.
    """
    return internlm2_keys(config).to_public(tensors, where=where)


def from_public(
    tensors: Mapping[str, Tensor], config: LlamaConfig, *, where: str
) -> dict[str, Tensor]:
    """Returns a public InternLM2 state dict as `LlamaForCausalLM`'s.

    Args:
        tensors: A public state dict.
        config: The Llama config of its `config.json`.
        where: File or directory, for messages.

    Raises:
        WeightsError: A tensor is missing or left over.
    """
    return internlm2_keys(config).from_public(tensors, where=where)


def write_internlm2(
    model: LlamaForCausalLM,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a directory in the public layout: `config.json` and safetensors.

    Args:
        model: The model, adapters merged.
        directory: Made if missing.
        dtype: Number format of the weights.
        max_shard_size: Largest file.

    Raises:
        ModelError: InternLM2 has no form for this Llama model.
        WeightsError: The model holds something the layout has no place for.
    """
    settings = llama_to_internlm2_config(model.config)
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")
    tensors = to_public(model.state_dict(), model.config, where=str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        directory,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
    )
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")

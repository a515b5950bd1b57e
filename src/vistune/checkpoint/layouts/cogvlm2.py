"""The public CogVLM2 layout, written: the state dict under its own names, and its `config.json`.

The model carries the public names, so nothing is renamed; what is done here is to prove that a
state dict is the public one, tensor for tensor, and to say the config in the public keys.
Reading stands in `vistune.models.families.cogvlm2`.

Source: CogVLM2-Llama3-chat-19B, config.json and the index of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration
from vistune.models.families.files import CONFIG_NAME, built_on_meta, check_names

PUBLIC_ROPE_THETA = 500000.0
"""Base of the rotary embedding; the public code holds it, the public config has no key for it."""

_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_multi_query_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "template_version",
    "tie_word_embeddings",
)
_VISION_KEYS = (
    "dropout_prob",
    "hidden_act",
    "hidden_size",
    "image_size",
    "in_channels",
    "intermediate_size",
    "layer_norm_eps",
    "num_heads",
    "num_hidden_layers",
    "num_positions",
    "patch_size",
)


def to_public_config(config: CogVLM2Config) -> dict[str, Any]:
    """Returns the public `config.json` of a model.

    Raises:
        ModelError: The model has another rotary base than the public code.
    """
    if config.rope_theta != PUBLIC_ROPE_THETA:
        raise ModelError(
            "the public CogVLM2 config cannot say the base of the rotary embedding",
            where="rope_theta",
            got=config.rope_theta,
            expected=PUBLIC_ROPE_THETA,
            fix="keep the model in vistune's own layout",
        )
    text, vision = config.to_dict(), config.vision_config.to_dict()
    return {
        "architectures": ["CogVLMForCausalLM"],
        **{key: text[key] for key in _TEXT_KEYS},
        "vision_config": {key: vision[key] for key in _VISION_KEYS},
    }


def to_public(
    tensors: Mapping[str, Tensor], config: CogVLM2Config, *, where: str
) -> dict[str, Tensor]:
    """Returns a state dict in the public layout: unchanged, and proved to be whole.

    Args:
        tensors: The model's state dict, adapters merged.
        config: Its shape.
        where: What is written, for messages.

    Raises:
        WeightsError: A tensor is missing or left over, such as an adapter that was not merged.
    """
    check_names(_names(config), tensors.keys(), where=where)
    return dict(tensors)


def from_public(
    tensors: Mapping[str, Tensor], config: CogVLM2Config, *, where: str
) -> dict[str, Tensor]:
    """Returns a public state dict under the model's names: unchanged, and proved to be whole.

    Args:
        tensors: A public state dict.
        config: The shape it must have.
        where: File or directory, for messages.

    Raises:
        WeightsError: A tensor is missing or left over.
    """
    check_names(_names(config), tensors.keys(), where=where)
    return dict(tensors)


def write_cogvlm2(
    model: CogVLM2ForConditionalGeneration,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a directory that the public code reads: `config.json` and safetensors with an index.

    Args:
        model: The model, adapters merged.
        directory: Made if missing.
        dtype: Number format of the weights; the public ones are bfloat16.
        max_shard_size: Largest file.

    Raises:
        ModelError: The public config cannot say this model.
        WeightsError: The model holds something the layout has no place for.
    """
    config = model.config
    settings = {**to_public_config(config), "torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = to_public(model.state_dict(), config, where=str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        directory,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
    )
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")


def _names(config: CogVLM2Config) -> frozenset[str]:
    model = built_on_meta(lambda: CogVLM2ForConditionalGeneration(config))
    return frozenset(model.state_dict())

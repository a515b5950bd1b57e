"""Writes a VisualGLM in the transformers layout (`image_encoder.*`, fused rows by head).

Reading stands in `vistune.models.families.visualglm`; the names in `vistune.models.visualglm.keys`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vistune.models.chatglm.tokenizer import ChatGLMTokenizer
from vistune.models.families.files import CONFIG_NAME
from vistune.models.visualglm import VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import hf_map


def write_visualglm_hf(
    model: VisualGLMForConditionalGeneration,
    directory: Path,
    *,
    tokenizer: ChatGLMTokenizer | None = None,
    dtype: torch.dtype = torch.float16,
    max_shard_size: str = "2GB",
) -> None:
    """Writes `config.json` and safetensors, with the tokenizer's file where one is given.

    Args:
        model: The model, adapters merged.
        directory: Made if missing.
        tokenizer: The model's tokenizer.
        dtype: Number format of the weights; the public ones are float16.
        max_shard_size: Largest file.

    Raises:
        WeightsError: The model holds something the layout has no place for, such as adapters
            that were not merged.
    """
    public = hf_map(model.config).to_public(model.state_dict(), where=str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: tensor.detach().to(dtype).contiguous() for name, tensor in public.items()},
        directory,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
    )
    settings = {**model.config.to_public(), "torch_dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))

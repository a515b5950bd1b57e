"""Writes an MGM in its public layout: Gemma's names, both towers, mining and projector among them.

Reading stands in `vistune.models.families.mgm`; the names in `vistune.models.mgm.keys`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vistune.models.families.files import CONFIG_NAME
from vistune.models.mgm import MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map

_TIED_HEAD = "language_model.lm_head.weight"


def write_mgm(
    model: MGMForConditionalGeneration,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Writes `config.json` and safetensors with an index.

    Args:
        model: The model, adapters merged.
        directory: Made if missing.
        dtype: Number format of the weights; the public ones are bfloat16.
        max_shard_size: Largest file.

    Raises:
        WeightsError: The model holds something the layout has no place for, such as adapters
            that were not merged.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name != _TIED_HEAD}
    public = mgm_map(model.config).to_public(own, where=str(directory))
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

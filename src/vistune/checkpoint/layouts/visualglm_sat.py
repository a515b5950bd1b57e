"""Writes a VisualGLM in SwissArmyTransformer's layout (`mixins.*`, one file of PyTorch tensors).

Reading stands in `vistune.models.families.visualglm`; the names in `vistune.models.visualglm.keys`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from vistune.models.families.visualglm import SAT_CONFIG_NAME, SAT_WEIGHTS_NAME
from vistune.models.visualglm import VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import POSITIONS, sat_map
from vistune.recipe import QkvOrder

_ITERATION = "1"


def write_visualglm_sat(
    model: VisualGLMForConditionalGeneration,
    directory: Path,
    *,
    qkv: QkvOrder = "blocks",
    dtype: torch.dtype = torch.float16,
    positions: Tensor | None = None,
) -> None:
    """Writes `model_config.json`, `latest` and the weights.

    Args:
        model: The model, adapters merged.
        directory: Made if missing.
        qkv: Order of ChatGLM's fused rows; "by_head" for SAT before July 2023.
        dtype: Number format of the weights; the public ones are float16.
        positions: The position table that SAT allocates and never reads, as it was found; zeros
            when None.

    Raises:
        WeightsError: The model holds something the layout has no place for, such as adapters
            that were not merged.
    """
    key_map = sat_map(model.config, qkv=qkv)
    public = key_map.to_public(model.state_dict(), where=str(directory))
    if positions is not None:
        public[POSITIONS] = positions
    folder = directory / _ITERATION
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in public.items()}
    torch.save({"module": tensors}, folder / SAT_WEIGHTS_NAME)
    (directory / "latest").write_text(_ITERATION, encoding="utf-8")
    text = json.dumps(model.config.to_public_sat(), indent=2, sort_keys=True) + "\n"
    (directory / SAT_CONFIG_NAME).write_text(text, encoding="utf-8")

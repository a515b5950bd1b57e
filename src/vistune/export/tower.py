"""An encoder as it was published, of which a composed model holds what it uses.

A model takes CLIP's last layer but one, so the last layer and the norm behind it are not in it.
Public layouts hold encoders whole: what is left out here is read again where the model came from.
Nothing of it changes what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistune.checkpoint.layouts import llava_hf, llava_original
from vistune.checkpoint.layouts.names import VISION
from vistune.models.compose import ComposedVLM
from vistune.models.facts import read_json, read_vision_config
from vistune.models.families.files import read_tensors
from vistune.models.towers.load import is_left_out, tower_class
from vistune.models.weights import load_strictly
from vistune.recipe import ModelConfig, VisionTowerConfig


@dataclass(frozen=True)
class WholeTower:
    """What a model's encoder is besides what the model uses.

    Args:
        config: The encoder's own config, all of its layers.
        rest: Weights that the model does not use, by their names in the encoder.
        inside: Whether the directory that the model came from holds the encoder itself.
    """

    config: Any
    rest: dict[str, Tensor]
    inside: bool

    def layer(self, model: ComposedVLM) -> int:
        """Returns the hidden state that a model takes, counted from the encoder's end."""
        # Hidden state k of N layers is index k - N - 1 from the end.
        kept = int(model.config.vision_config.num_hidden_layers)
        return kept - int(self.config.num_hidden_layers) - 1


def whole_tower(model: ComposedVLM, sources: ModelConfig) -> WholeTower | None:
    """Finds the rest of a model's encoder.

    Args:
        model: The model; its encoder is CLIP or SigLIP.
        sources: What it was built from.

    Returns:
        None where it was built from a directory that does not hold the rest either.

    Raises:
        WeightsError: The encoder's files are damaged.
    """
    if sources.vision_tower is not None:
        return _of_encoder(model, sources.vision_tower)
    if sources.from_checkpoint is None:
        return None
    folder = Path(sources.from_checkpoint)
    values = read_json(folder / "config.json")
    if llava_hf.matches(values):
        config = llava_hf.read_config(folder).vision_config
        return WholeTower(config, _inside(model, folder, llava_hf.to_composed) or {}, inside=True)
    if not llava_original.matches(values):
        return None
    tower = llava_original.tower_of(values, sources.bases.vision_tower)
    rest = _inside(model, folder, llava_original.to_composed)
    if rest is None:
        return _of_encoder(model, tower)
    return WholeTower(read_vision_config(tower), rest, inside=True)


def _inside(
    model: ComposedVLM, folder: Path, rename: Callable[[str], str]
) -> dict[str, Tensor] | None:
    """Returns what a directory holds of an encoder besides the used, None where it has none."""
    found = {
        name.removeprefix(VISION): tensor
        for name, tensor in ((rename(public), tensor) for public, tensor in read_tensors(folder))
        if name.startswith(VISION)
    }
    config, plan = model.config.vision_config, model.plan
    rest = {n: t for n, t in found.items() if is_left_out(n, config, plan)}
    return {n: t for n, t in rest.items() if "position_ids" not in n} if found else None


def _of_encoder(model: ComposedVLM, tower: VisionTowerConfig) -> WholeTower:
    plan = model.plan
    config = read_vision_config(tower)
    built = deepcopy(config)
    for key, value in plan.traits.config_changes:
        setattr(built, key, value)
    whole, _ = load_strictly(
        tower_class(plan),
        tower.path,
        key="model.vision_tower.path",
        dtype=next(model.vision_tower.parameters()).dtype,
        revision=tower.revision,
        harmless=lambda key: is_left_out(key, built, plan),
        config=built,
        **dict(plan.traits.model_kwargs),
    )
    assert isinstance(whole, torch.nn.Module)
    used = model.vision_tower.state_dict().keys()
    rest = {name: tensor for name, tensor in whole.state_dict().items() if name not in used}
    return WholeTower(built, rest, inside=False)

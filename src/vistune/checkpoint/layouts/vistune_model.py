"""Vistune's own model directory: one config and one set of weights, with tokenizer and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vistune.models.anyres import with_tiles
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.facts import ModelFacts, load_tokenizer, read_image_defaults
from vistune.models.language.decoder import check_model
from vistune.models.towers.families import tower_grid
from vistune.models.weights import load_strictly
from vistune.recipe import TilesConfig

NAME = "vistune"
_KEY = "model.from_checkpoint"


def matches(values: dict[str, Any]) -> bool:
    """Whether a config.json is vistune's."""
    return values.get("model_type") == ComposedConfig.model_type


def describe(folder: Path) -> ModelFacts:
    """Reads config, preprocessor file and tokenizer."""
    config = ComposedConfig.from_pretrained(folder)
    plan = config.tower_plan
    tokenizer, _ = load_tokenizer(str(folder), key=_KEY)
    facts = ModelFacts(
        tokenizer=tokenizer,
        image_token_id=int(config.image_token_id),
        grid=tower_grid(
            config.vision_config, plan, pixel_shuffle=config.pixel_shuffle, where=str(folder)
        ),
        image_defaults=read_image_defaults(str(folder), config.vision_config),
        vision_config=config.vision_config,
        text_config=config.text_config,
        tower=plan,
    )
    if config.tiles is None:
        return facts
    tiles = TilesConfig.model_validate(config.tiles)
    return with_tiles(facts, tiles, where=str(folder / "config.json"))


def load(folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> ComposedVLM:
    """Loads the model."""
    model, _ = load_strictly(ComposedVLM, str(folder), key=_KEY, dtype=dtype)
    assert isinstance(model, ComposedVLM)
    check_model(model.language_model, where=str(folder))
    return model

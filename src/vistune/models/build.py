"""Builds a composed model from its parts: loads them strictly and initialises the connector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.adapters import fold_adapter
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.connector_weights import load_connector
from vistune.models.connectors import build_connector, initialise_connector
from vistune.models.facts import ModelFacts, language_family
from vistune.models.language.decoder import load_language_model
from vistune.models.towers.families import features_width
from vistune.models.towers.load import is_left_out, load_tower
from vistune.recipe import ModelConfig

if TYPE_CHECKING:
    from vistune.models.mgm import MGMForConditionalGeneration


def build_model(
    config: ModelConfig, facts: ModelFacts, *, seed: int, dtype: torch.dtype
) -> ComposedVLM | MGMForConditionalGeneration:
    """Loads the parts of a model and composes them.

    Args:
        config: The parts.
        facts: What `describe` found of them.
        seed: Seed of the connector's weights.
        dtype: Format of all weights; tuning turns the trained ones into fp32.

    Returns:
        The model on the CPU, in evaluation mode, everything frozen or not as loaded. With a second
        tower it is an MGM.

    Raises:
        WeightsError: Weights are missing, unexpected or of another shape.
        ModelError: The parts do not fit together.
    """
    if config.vision_tower is None or config.language_model is None:
        raise ModelError(
            "only parts can be built here",
            where="model.from_checkpoint",
            fix="load a whole model with checkpoint.layouts.load_directory",
        )
    if config.vision_tower_aux is not None:
        from vistune.models.families.mgm_parts import build_mgm

        return build_mgm(config, seed=seed, dtype=dtype)
    assert facts.tower is not None
    language_model, _ = load_language_model(config.language_model, facts.text_config, dtype=dtype)
    vision_tower, _ = load_tower(config.vision_tower, facts.vision_config, facts.tower, dtype=dtype)
    _fold_adapters(config, facts, language_model, vision_tower)
    composed = ComposedConfig.compose(
        vision_config=facts.vision_config,
        text_config=language_model.config,
        tower=facts.tower,
        connector_kind=config.connector.kind,
        pixel_shuffle=config.connector.pixel_shuffle,
        image_token_id=facts.image_token_id,
        image_embed_scale=_compat.embedding_scale(language_model.get_input_embeddings()),
    )
    model = ComposedVLM(
        composed,
        vision_tower=vision_tower,
        connector=_connector(config, facts, seed=seed).to(dtype),
        language_model=language_model,
    )
    if config.tiles is not None:
        model.add_tiles(config.tiles, seed=seed)
    model.eval()
    return model


def _connector(config: ModelConfig, facts: ModelFacts, *, seed: int) -> nn.Module:
    """Returns the connector, its weights drawn or read."""
    assert facts.tower is not None
    connector = build_connector(
        config.connector.kind,
        num_in=features_width(facts.vision_config, facts.tower) * config.connector.pixel_shuffle**2,
        num_out=int(facts.text_config.hidden_size),
    )
    initialise_connector(connector, seed=seed)
    if config.connector.weights is not None:
        load_connector(connector, Path(config.connector.weights))
    return connector


def replace_connector(model: nn.Module, path: Path) -> None:
    """Puts saved weights in the place of a whole model's connector; of an MGM, its towers too.

    Args:
        model: A whole model, changed in place.
        path: See `model.connector.weights`.

    Raises:
        WeightsError: The file does not hold this model's connector.
        ModelError: There is no form of this model's connector alone.
    """
    from vistune.models.families.mgm_parts import replace_mgm_connector
    from vistune.models.mgm import MGMForConditionalGeneration
    from vistune.models.visualglm import VisualGLMForConditionalGeneration

    if isinstance(model, MGMForConditionalGeneration):
        replace_mgm_connector(model, path)
    elif isinstance(model, (ComposedVLM, VisualGLMForConditionalGeneration)):
        load_connector(model.connector, path)
    else:
        raise ModelError(
            "this model's connector has no form of its own",
            where="model.connector.weights",
            got=type(model).__name__,
            fix="leave model.connector.weights out",
        )


def _fold_adapters(
    config: ModelConfig, facts: ModelFacts, language_model: Any, vision_tower: nn.Module
) -> None:
    """Folds the adapters that a recipe names into the parts they were trained on."""
    language, tower, plan = config.language_model, config.vision_tower, facts.tower
    assert language is not None and tower is not None and plan is not None
    if language.adapter is not None:
        family = language_family(language)
        fold_adapter(
            language_model,
            Path(language.adapter).expanduser(),
            key="model.language_model.adapter",
            public=None if family is None else family.key_map(language_model.config),
        )
    if tower.adapter is not None:
        fold_adapter(
            vision_tower,
            Path(tower.adapter).expanduser(),
            key="model.vision_tower.adapter",
            # CLIP's and SigLIP's towers once had one more level of names.
            own_name=lambda name: name.removeprefix("vision_model."),
            left_out=lambda name: is_left_out(name, facts.vision_config, plan),
        )

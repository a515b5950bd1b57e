"""Transformers' LLaVA and LLaVA-NeXT (1.6), under the names the hub uses.

`vision_tower.vision_model.*`, `multi_modal_projector.linear_{1,2}.*`, `language_model.model.*`,
`language_model.lm_head.*` and, of LLaVA-NeXT, `image_newline`. The names that transformers holds
in memory (`model.vision_tower`, ...) and those it writes for a model made from a config are read
too; only the hub's are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vistune.checkpoint.layouts.names import (
    CONNECTOR,
    LANGUAGE,
    NEWLINE,
    VISION,
    fill_model,
    model_state,
)
from vistune.errors import ModelError
from vistune.models.anyres import grids_of, tiles_of, with_tiles
from vistune.models.compose import ComposedConfig, ComposedVLM
from vistune.models.facts import (
    ModelFacts,
    load_tokenizer,
    processor_template,
    read_image_defaults,
    read_json,
)
from vistune.models.language.decoder import check_config, check_model
from vistune.models.towers.families import FAMILIES, plan_tower, tower_grid

NAME = "LlavaForConditionalGeneration, LlavaNextForConditionalGeneration"
NEXT = "llava_next"
KEY = "model.from_checkpoint"
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model")
_PROJECTOR = {"linear_1": "0", "linear_2": "2"}
_PARTS = ("vision_tower.", "multi_modal_projector.", "language_model.")


def matches(values: dict[str, Any]) -> bool:
    """Whether a config.json is of transformers' LLaVA or LLaVA-NeXT; not Pixtral under its name."""
    vision = values.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        return False
    return values.get("model_type") in ("llava", NEXT) and "vision_config" in values


def describe(folder: Path) -> ModelFacts:
    """Reads config, preprocessor file and tokenizer.

    Raises:
        ModelError: The model has a form that a composed model cannot take.
    """
    is_next = _is_next(folder)
    config = read_config(folder)
    _check(config, where=str(folder / "config.json"))
    select: Literal["patch", "cls_patch"] = "patch"
    has_class = FAMILIES[config.vision_config.model_type].class_token
    if config.vision_feature_select_strategy == "full" and has_class:
        select = "cls_patch"
    plan, vision_config = plan_tower(
        config.vision_config,
        layer=config.vision_feature_layer,
        select=select,
        where=str(folder),
    )
    tokenizer, _ = load_tokenizer(str(folder), key=KEY)
    tokenizer.chat_template = processor_template(folder) or tokenizer.chat_template
    # As of the original: LLaVA on Vicuna brought no template for years.
    is_vicuna = tokenizer.chat_template is None and config.text_config.model_type == "llama"
    facts = ModelFacts(
        tokenizer=tokenizer,
        image_token_id=int(config.image_token_index),
        grid=tower_grid(vision_config, plan, pixel_shuffle=1, where=str(folder)),
        image_defaults=read_image_defaults(str(folder), vision_config),
        vision_config=vision_config,
        text_config=config.text_config,
        tower=plan,
        template="vicuna_v1" if is_vicuna else "auto",
        adds_bos=True,
    )
    if not is_next:
        return facts
    where = str(folder / "config.json")
    side = int(config.vision_config.image_size)
    tiles = grids_of(config.image_grid_pinpoints, side, swapped=False, where=where)
    return with_tiles(facts, tiles, where=where)


def read_config(folder: Path) -> Any:
    """Returns transformers' config of a directory."""
    from transformers import LlavaConfig, LlavaNextConfig

    return (LlavaNextConfig if _is_next(folder) else LlavaConfig).from_pretrained(folder)


def _is_next(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") == NEXT


def _check(config: Any, *, where: str) -> None:
    drops_first = config.vision_feature_select_strategy == "default"
    tower = config.vision_config.model_type
    wrong = {
        "vision_config.model_type": (tower, tower not in TOWER_TYPES),
        "vision_feature_layer": (
            config.vision_feature_layer,
            not isinstance(config.vision_feature_layer, int),
        ),
        "projector_hidden_act": (
            config.projector_hidden_act,
            config.projector_hidden_act != "gelu",
        ),
        "multimodal_projector_bias": (
            config.multimodal_projector_bias,
            not config.multimodal_projector_bias,
        ),
        # It would drop the first patch of a tower without class token.
        "vision_feature_select_strategy": (
            config.vision_feature_select_strategy,
            drops_first and tower == "siglip_vision_model",
        ),
    }
    found = [f"{name}={value}" for name, (value, is_wrong) in wrong.items() if is_wrong]
    if found:
        raise ModelError(
            "this LLaVA has a form that vistune does not compose",
            where=where,
            got=", ".join(found),
            expected="a CLIP or SigLIP tower, one feature layer, an MLP with GELU and biases",
        )


def load(folder: Path, facts: ModelFacts, *, dtype: torch.dtype) -> ComposedVLM:
    """Loads the model, every weight accounted for.

    Raises:
        WeightsError: A weight is missing, left over or of another shape.
    """
    from vistune.models.families.files import read_tensors

    check_config(facts.text_config, where=str(folder))
    assert facts.tower is not None
    config = ComposedConfig.compose(
        vision_config=facts.vision_config,
        text_config=facts.text_config,
        tower=facts.tower,
        connector_kind="mlp2x_gelu",
        pixel_shuffle=1,
        image_token_id=facts.image_token_id,
        image_embed_scale=1.0,  # transformers' LLaVA scales text embeddings alone
        tiles=tiles_of(facts) if _is_next(folder) else None,
    )
    model = fill_model(
        config,
        dict(read_tensors(folder)),
        to_composed,
        from_composed,
        dtype=dtype,
        where=str(folder),
    )
    check_model(model.language_model, where=str(folder))
    return model


def to_composed(name: str) -> str:
    """Returns the composed model's name of a weight."""
    inner = name.removeprefix("model.")
    if inner == "image_newline":
        return NEWLINE
    if inner.startswith(_PARTS):
        name = inner
    if name.startswith("vision_tower."):
        return VISION + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    if name.startswith("multi_modal_projector."):
        layer, _, kind = name.removeprefix("multi_modal_projector.").partition(".")
        return f"{CONNECTOR}{_PROJECTOR.get(layer, layer)}.{kind}"
    if name.startswith("lm_head."):
        return LANGUAGE + name
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        if not inner.startswith(("lm_head.", "model.")):
            inner = f"model.{inner}"
        return LANGUAGE + inner
    return name


def from_composed(name: str) -> str:
    """Returns the hub's name of a weight of the composed model."""
    if name == NEWLINE:
        return "image_newline"
    if name.startswith(VISION):
        return "vision_tower.vision_model." + name.removeprefix(VISION)
    if name.startswith(CONNECTOR):
        layer, _, kind = name.removeprefix(CONNECTOR).partition(".")
        names = {ours: theirs for theirs, ours in _PROJECTOR.items()}
        return f"multi_modal_projector.{names[layer]}.{kind}"
    assert name.startswith(LANGUAGE)
    return name


def public_state(model: ComposedVLM) -> dict[str, Tensor]:
    """Returns a model's weights under the hub's names."""
    return {from_composed(name): tensor for name, tensor in model_state(model).items()}

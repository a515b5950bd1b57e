"""The original LLaVA repository's layout (`LlavaLlamaForCausalLM`).

`model.mm_projector.*`, `model.vision_tower.vision_tower.vision_model.*`, `model.image_newline`
where images are cut into tiles (1.6), and the language model's own names for the rest. Released
checkpoints of 1.5 carry no tower: it is then loaded from the encoder that `mm_vision_tower` names.
A tower that is in the checkpoint is used, since it may have been trained.

Source: LLaVA v1.2.2.post1.
"""

from __future__ import annotations

import json
from dataclasses import replace
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
    at_largest_scale,
    load_tokenizer,
    read_image_defaults,
    read_json,
    read_vision_config,
)
from vistune.models.language.decoder import check_config, check_model
from vistune.models.language.llava import NEWLINE as PUBLIC_NEWLINE
from vistune.models.language.llava import (
    PROJECTOR,
    TOWER,
    is_original_llava,
    llava_text_config,
    text_type_of,
)
from vistune.models.towers.families import plan_tower, tower_grid
from vistune.models.towers.load import load_tower
from vistune.recipe import VisionTowerConfig

NAME = "LlavaLlamaForCausalLM"
KEY = "model.from_checkpoint"
_SCALES = "336,672,1008"


def matches(values: dict[str, Any]) -> bool:
    """Whether a config.json is of the original LLaVA."""
    return is_original_llava(values)


def describe(folder: Path, *, tower_path: str | None = None) -> ModelFacts:
    """Reads config, tokenizer and the encoder's preprocessor file.

    Args:
        folder: The directory.
        tower_path: Where the encoder is; where its config says it is when None.

    Raises:
        ModelError: The model has a form that a composed model cannot take, or the encoder that
            its config names is not there.
    """
    values = read_json(folder / "config.json")
    _check(values, where=str(folder / "config.json"))
    tower = tower_of(values, tower_path)
    whole = read_vision_config(tower)
    plan, vision_config = plan_tower(
        whole, layer=tower.layer, select=tower.select, where=tower.path, scales=tower.s2 or ()
    )
    own_file = (folder / "preprocessor_config.json").is_file()
    tokenizer, image_token_id = load_tokenizer(str(folder), key=KEY)
    defaults = read_image_defaults(str(folder) if own_file else tower.path, whole)
    # Where nothing is said it is the encoder's own way: the middle of the picture.
    mode: Literal["crop", "pad"] = (
        "crop" if values.get("image_aspect_ratio") in (None, "square") else "pad"
    )
    facts = ModelFacts(
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        grid=tower_grid(vision_config, plan, pixel_shuffle=1, where=tower.path),
        image_defaults=at_largest_scale(replace(defaults, mode=mode), plan),
        vision_config=vision_config,
        text_config=llava_text_config(values),
        tower=plan,
        template=_template(values, tokenizer),
    )
    if not _has_tiles(values):
        return facts
    where = str(folder / "config.json")
    tiles = grids_of(_pinpoints(values, where=where), _tile_px(facts), swapped=True, where=where)
    return with_tiles(facts, tiles, where=where)


def _has_tiles(values: dict[str, Any]) -> bool:
    return values.get("mm_patch_merge_type") == "spatial_unpad"


def _tile_px(facts: ModelFacts) -> int:
    return facts.grid.fixed_size_px or facts.image_defaults.size_px


def _pinpoints(values: dict[str, Any], *, where: str) -> list[list[int]]:
    """Returns (width, height) of the canvases; configs hold a list, or one written as text."""
    found: Any = values.get("image_grid_pinpoints")
    try:
        if isinstance(found, str):
            found = json.loads(found.replace("(", "[").replace(")", "]"))
        return [[int(side) for side in one] for one in found]
    except (TypeError, ValueError) as error:
        raise ModelError(
            "the sizes that images are cut from cannot be read",
            where=where,
            got=f"image_grid_pinpoints {found!r}",
            expected="a list of pairs of pixels",
        ) from error


def _template(values: dict[str, Any], tokenizer: Any) -> str:
    """Returns what `data.template=auto` stands for: no released LLaVA-1.5 brings a template."""
    own = tokenizer.chat_template or text_type_of(values) != "llama"
    return "auto" if own else "vicuna_v1"


def tower_of(values: dict[str, Any], path: str | None) -> VisionTowerConfig:
    """Returns the encoder that a config.json names.

    Args:
        values: Its content.
        path: Where the encoder is; where the config says it is when None.
    """
    return VisionTowerConfig(
        path=path or str(values["mm_vision_tower"]),
        layer=int(values.get("mm_vision_select_layer", -1)),
        select=values.get("mm_vision_select_feature", "patch"),
        s2=_scales(values),
    )


def _scales(values: dict[str, Any]) -> tuple[int, ...] | None:
    if not values.get("s2"):
        return None
    return tuple(sorted(int(side) for side in str(values.get("s2_scales", _SCALES)).split(",")))


def _check(values: dict[str, Any], *, where: str) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "mm_patch_merge_type": ("flat", "spatial_unpad", None),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_resampler_type": (None,),
    }
    tiled = values.get("image_aspect_ratio") == "anyres"
    if tiled != _has_tiles(values):  # tiles without newlines, or newlines without tiles
        allowed["image_aspect_ratio"] = ("pad", "square", None) if tiled else ("anyres",)
    wrong = [f"{key}={values[key]}" for key in allowed if values.get(key) not in allowed[key]]
    if wrong:
        raise ModelError(
            "this LLaVA has a form that vistune does not compose",
            where=where,
            got=", ".join(wrong),
            expected="one run of image tokens for an image, without start and end tokens; tiles as"
            " anyres with spatial_unpad",
        )


def load(
    folder: Path, facts: ModelFacts, *, dtype: torch.dtype, tower_path: str | None = None
) -> ComposedVLM:
    """Loads the model, every weight accounted for.

    Args:
        folder: The directory.
        facts: From `describe`.
        dtype: Format of the weights.
        tower_path: As in `describe`.

    Raises:
        WeightsError: A weight is missing, left over or of another shape.
    """
    from vistune.models.families.files import read_tensors

    values = read_json(folder / "config.json")
    check_config(facts.text_config, where=str(folder))
    assert facts.tower is not None
    config = ComposedConfig.compose(
        vision_config=facts.vision_config,
        text_config=facts.text_config,
        tower=facts.tower,
        connector_kind=values.get("mm_projector_type", "linear"),
        pixel_shuffle=1,
        image_token_id=facts.image_token_id,
        image_embed_scale=1.0,
        tiles=tiles_of(facts) if _has_tiles(values) else None,
    )
    tensors = dict(read_tensors(folder))
    if not any(name.startswith(TOWER) for name in tensors):
        tower, _ = load_tower(
            tower_of(values, tower_path), facts.vision_config, facts.tower, dtype=dtype
        )
        tensors |= {f"{TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}
    model = fill_model(config, tensors, to_composed, from_composed, dtype=dtype, where=str(folder))
    check_model(model.language_model, where=str(folder))
    return model


def to_composed(name: str) -> str:
    """Returns the composed model's name of a weight."""
    if name.startswith(TOWER):
        return VISION + name.removeprefix(TOWER).removeprefix("vision_model.")
    if name.startswith(PROJECTOR):
        return CONNECTOR + name.removeprefix(PROJECTOR)
    return NEWLINE if name == PUBLIC_NEWLINE else LANGUAGE + name


def from_composed(name: str) -> str:
    """Returns the original name of a weight of the composed model."""
    if name.startswith(VISION):
        return f"{TOWER}vision_model.{name.removeprefix(VISION)}"
    if name.startswith(CONNECTOR):
        return PROJECTOR + name.removeprefix(CONNECTOR)
    return PUBLIC_NEWLINE if name == NEWLINE else name.removeprefix(LANGUAGE)


def public_state(model: ComposedVLM) -> dict[str, Tensor]:
    """Returns a model's weights under the original names."""
    return {from_composed(name): tensor for name, tensor in model_state(model).items()}

"""Writes the original LLaVA's layout (`LlavaLlamaForCausalLM`): its names, its config, no code.

As in the released checkpoints of 1.5 the tower is left out and named in the config, unless it was
trained or came with the model.

Source: LLaVA v1.2.2.post1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vistune.checkpoint.layouts.llava_original import from_composed, public_state
from vistune.checkpoint.layouts.names import VISION
from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.data.layout import AnyresLayout
from vistune.errors import ModelError
from vistune.export.files import (
    image_processor_values,
    write_json,
    write_tokenizer,
    write_weights,
)
from vistune.export.tower import WholeTower
from vistune.models.anyres import pinpoints_of
from vistune.models.compose import ComposedVLM
from vistune.models.facts import read_vision_config
from vistune.models.language.pieces import copy_pieces, has_only_pieces
from vistune.models.towers.families import features_width
from vistune.models.towers.load import load_tower
from vistune.models.tune.lora import adapter_layers
from vistune.recipe import VisionTowerConfig

_ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
_MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral"}
_TOWER = "model.vision_tower."


def misfits_llava(model: ComposedVLM) -> list[str]:
    """Returns what keeps a model from the original LLaVA's layout; empty when nothing does."""
    config, plan = model.config, model.plan
    found = []
    if config.text_config.model_type not in _ARCHITECTURES:
        found.append(f"a language model of type '{config.text_config.model_type}'")
    if plan.family != "clip_vision_model" or plan.normalised:
        found.append(f"a '{plan.family}' tower{' behind its final norm' * plan.normalised}")
    if config.pixel_shuffle != 1 or config.image_embed_scale != 1.0:
        found.append("folded patches or scaled image embeddings")
    if adapter_layers(model):
        found.append("adapters that are not merged")
    return found


def write_llava(
    model: ComposedVLM,
    encoder: Encoder,
    manifest: Manifest,
    folder: Any,
    *,
    tower_path: str | None,
    tower: WholeTower | None,
    source: Path | None,
) -> None:
    """Writes a directory that the original code loads.

    Args:
        model: Adapters merged.
        encoder: Its encoder.
        manifest: Its description, of kind `model`.
        folder: An empty directory.
        tower_path: The encoder the tower was cut from.
        tower: That encoder, whole; what the model uses of it alone is written when None.
        source: The directory of the tokenizer; its sentencepiece file, which the original code
            reads, is copied as it is.

    Raises:
        ModelError: The layout has no place for this model, or the encoder is not known.
    """
    wrong = misfits_llava(model)
    if wrong or tower_path is None:
        raise ModelError(
            "this model cannot be written in the original LLaVA's layout",
            got="; ".join(wrong) or "a model that does not say which encoder its tower is",
            expected="CLIP, a projector, and Llama or Mistral; built from model.vision_tower.path",
            fix="export with --to hf or --to vistune"
            if wrong
            else "name the encoder with --vision-tower",
        )
    state = public_state(model)
    inside = tower is not None and tower.inside
    if not inside and _is_original(model, tower_path):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_TOWER)}
    elif tower is not None:
        dtype = next(model.vision_tower.parameters()).dtype
        state |= {from_composed(f"{VISION}{n}"): t.to(dtype) for n, t in tower.rest.items()}
    write_weights(folder, state)
    if source is not None and has_only_pieces(source):
        copy_pieces(source, folder)
        write_json(folder / "preprocessor_config.json", image_processor_values(encoder))
    else:
        write_tokenizer(folder, encoder)
    write_json(folder / "config.json", _settings(model, encoder, tower_path=tower_path))
    write_manifest(folder, manifest)


def _settings(model: ComposedVLM, encoder: Encoder, *, tower_path: str) -> dict[str, Any]:
    """Returns the values of config.json."""
    whole = read_vision_config(VisionTowerConfig(path=tower_path))
    kept = int(model.config.vision_config.num_hidden_layers)
    text = model.config.text_config
    settings = {
        **text.to_dict(),
        "architectures": [_ARCHITECTURES[text.model_type]],
        "model_type": _MODEL_TYPES[text.model_type],
        "mm_vision_tower": tower_path,
        # Hidden state k of N layers is index k - N - 1 from the end.
        "mm_vision_select_layer": kept - int(whole.num_hidden_layers) - 1,
        "mm_vision_select_feature": model.plan.select,
        "mm_projector_type": model.config.connector_kind,
        "mm_hidden_size": features_width(model.config.vision_config, model.plan),
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if encoder.image_plan.mode == "pad" else "square",
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    settings |= _image_settings(model, encoder)
    settings["rope_theta"] = float(text.rope_parameters["rope_theta"])
    for key in ("dtype", "rope_parameters"):  # keys of later transformers versions
        settings.pop(key, None)
    return settings


def _image_settings(model: ComposedVLM, encoder: Encoder) -> dict[str, Any]:
    """Returns the keys of tiles (1.6) and of several scales (S2)."""
    if isinstance(encoder.layout, AnyresLayout):
        side = encoder.layout.plan.size_px
        return {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": pinpoints_of(encoder.layout.grids, side, swapped=True),
            "mm_patch_merge_type": "spatial_unpad",
        }
    if model.plan.scales:
        return {"s2": True, "s2_scales": ",".join(map(str, model.plan.scales))}
    return {}


def _is_original(model: ComposedVLM, tower_path: str) -> bool:
    """Whether the model's tower is, bit for bit, the one its encoder's directory holds."""
    dtype = next(model.vision_tower.parameters()).dtype
    original, _ = load_tower(
        VisionTowerConfig(path=tower_path), model.config.vision_config, model.plan, dtype=dtype
    )
    theirs = original.state_dict()
    return all(torch.equal(t, theirs[n]) for n, t in model.vision_tower.state_dict().items())

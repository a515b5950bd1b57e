"""Writes XTuner's LLaVA layout: `projector/`, and adapters or a whole language model beside it.

    <folder>/projector/               config.json, model.safetensors (`model.0.weight`, ...)
    <folder>/llm_adapter/             PEFT adapter, when the language model was tuned with LoRA
    <folder>/                         the language model itself, when it was trained in full
    <folder>/visual_encoder_adapter/  PEFT adapter of the tower, when it has one
    <folder>/xtuner_config.py         the models that all this stands on, by XTuner's names for them

XTuner keeps two Python files of its own in `projector/`, which are not written. InternLM2's
adapters are written by its public names (`internlm2_adapter`); as DoRA they are merged and the
whole model is written, and so are a LLaVA's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from vistune.checkpoint.layouts.internlm2 import write_internlm2
from vistune.checkpoint.layouts.partial import TEMPLATES
from vistune.checkpoint.manifest import Manifest
from vistune.checkpoint.merge import merge_adapters
from vistune.data.encode import Encoder
from vistune.errors import ModelError
from vistune.export.adapter import write_peft
from vistune.export.files import MAX_SHARD, write_json, write_tokenizer
from vistune.export.internlm2_adapter import write_internlm2_adapter
from vistune.models.compose import ComposedVLM
from vistune.models.facts import language_family
from vistune.models.families.internlm2 import InternLM2Family
from vistune.models.towers.families import tower_width
from vistune.models.tune.lora import adapter_layers
from vistune.models.weights import quiet_transformers
from vistune.recipe import LanguageModelConfig, ModelConfig

_CLIP_LEVEL = "vision_model."


def write_xtuner(model: ComposedVLM, encoder: Encoder, manifest: Manifest, folder: Path) -> None:
    """Writes what a run trained.

    Args:
        model: With its adapters, not merged; changed in place.
        encoder: Its encoder.
        manifest: The run's description; its parts are what the adapters stand on.
        folder: An empty directory.

    Raises:
        ModelError: The connector or the tower has a form the layout has no place for.
    """
    parts = manifest.parts
    if parts is None or parts.language_model is None or parts.vision_tower is None:
        raise ModelError(
            "XTuner's layout holds what was trained beside public parts, and these are not known",
            where="model.from_checkpoint",
            fix="export a run whose recipe names model.vision_tower and model.language_model",
        )
    modes = {role: manifest.tune.get(role, {}).get("mode", "freeze") for role in _TRAINED}
    if modes["vision"] == "full" or modes["head"] == "full":
        raise ModelError(
            "XTuner's layout has no place for a tower or a head trained by itself",
            where="tune",
            got=modes,
            fix="export with --to hf or --to vistune",
        )
    if parts.vision_tower.adapter is not None:
        raise ModelError(
            "the tower already holds adapters of an earlier run, which would be lost",
            where="model.vision_tower.adapter",
            got=parts.vision_tower.adapter,
            fix="export with --to hf, --to llava or --to vistune",
        )
    _write_projector(model, folder / "projector")
    layers = adapter_layers(model)
    if any(name.startswith("vision_tower.") for name in layers):
        target = folder / "visual_encoder_adapter"
        write_peft(model.vision_tower, base=parts.vision_tower.path, folder=target)
        _add_level(target, _CLIP_LEVEL)
    _write_trained_language(model.language_model, parts.language_model, manifest, folder)
    write_tokenizer(folder, encoder)
    _write_names(parts, encoder, folder)


def _write_names(parts: ModelConfig, encoder: Encoder, folder: Path) -> None:
    """Writes what XTuner's configs assign, so that this directory is enough to load it again."""
    assert parts.language_model is not None and parts.vision_tower is not None
    names = {
        "llm_name_or_path": parts.language_model.path,
        "visual_encoder_name_or_path": parts.vision_tower.path,
    }
    if encoder.template.name in TEMPLATES.values():
        names["prompt_template"] = encoder.template.name
    text = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (folder / "xtuner_config.py").write_text(text, encoding="utf-8")


_TRAINED = ("vision", "language", "head")


def _write_projector(model: ComposedVLM, folder: Path) -> None:
    linears = [module for module in model.connector.modules() if isinstance(module, nn.Linear)]
    if not linears or model.config.pixel_shuffle != 1 or model.config.image_embed_scale != 1.0:
        raise ModelError(
            "XTuner's projector is a linear layer or an MLP, on unfolded patches",
            got=f"{model.config.connector_kind}, pixel_shuffle {model.config.pixel_shuffle}",
            fix="export with --to vistune",
        )
    if model.tiles is not None or model.plan.scales:
        raise ModelError(
            "XTuner's layout has no place for images in tiles or at several scales",
            fix="export with --to llava or --to vistune",
        )
    alone = isinstance(model.connector, nn.Linear)
    state = {
        f"model.{'0.' if alone else ''}{name}": tensor.detach().cpu().contiguous()
        for name, tensor in model.connector.state_dict().items()
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["ProjectorModel"],
        "model_type": "projector",
        "visual_hidden_size": tower_width(model.config.vision_config),
        "llm_hidden_size": int(model.config.text_config.hidden_size),
        "depth": len(linears),
        "hidden_act": "gelu",
        "bias": True,
    }
    write_json(folder / "config.json", settings)


def _write_trained_language(
    language_model: Any, part: LanguageModelConfig, manifest: Manifest, folder: Path
) -> None:
    """Writes the adapters, or the whole language model where these would not say everything."""
    tune = manifest.tune.get("language", {})
    family = language_family(part)
    is_internlm2 = isinstance(family, InternLM2Family)
    adapted, target = bool(adapter_layers(language_model)), folder / "llm_adapter"
    if adapted and part.adapter is None and family is None:
        write_peft(language_model, base=part.path, folder=target)
    elif adapted and part.adapter is None and is_internlm2 and not tune.get("dora"):
        write_internlm2_adapter(language_model, base=part.path, folder=target)
    elif adapted or tune.get("mode") == "full" or part.adapter is not None:
        merge_adapters(language_model)
        dtype = next(language_model.parameters()).dtype
        _write_language(language_model, folder, is_internlm2=is_internlm2, dtype=dtype)


def _write_language(
    language_model: Any, folder: Path, *, is_internlm2: bool, dtype: torch.dtype
) -> None:
    if is_internlm2:
        assert isinstance(language_model, LlamaForCausalLM)
        write_internlm2(language_model, folder, dtype=dtype)
        return
    with quiet_transformers():
        language_model.save_pretrained(folder, max_shard_size=MAX_SHARD)


def _add_level(folder: Path, level: str) -> None:
    """Gives a tower's adapter the names of the encoder that XTuner loads."""
    path, prefix = folder / "adapter_model.safetensors", "base_model.model."
    state = load_file(path)
    renamed = {f"{prefix}{level}{n.removeprefix(prefix)}": t for n, t in state.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    targets = settings["target_modules"]
    settings["target_modules"] = [f"{level}{t}" if "." in t else t for t in targets]
    write_json(config, settings)

"""Tiny models for the shipped recipes of the seed models. Not a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from family_dirs import LLAVA_KIND, PARITY, byte_tokenizer, write_family, write_mgm_parts
from safetensors.torch import save_file
from tiny_parts import write_tower

from vistune.assembly import build, draw
from vistune.recipe import load_recipe

_WHOLE = {"cogvlm2": "cogvlm2", "visualglm": "visualglm", "llava-1.5/7b-task-lora": LLAVA_KIND}
_FAMILIES = ("cogvlm2", "visualglm", "xtuner", "mgm")


def is_seed_recipe(name: str) -> bool:
    """Whether a shipped recipe is one of these models'."""
    return name.startswith(tuple(f"{family}/" for family in _FAMILIES)) or name in _WHOLE


def seed_settings(name: str, folder: Path) -> list[str]:
    """Writes the models that a recipe stands on into a folder; returns the overrides for them."""
    family = name.partition("/")[0]
    kind = _WHOLE.get(name) or _WHOLE.get(family)
    if kind is not None:
        whole = write_family(kind, folder / "whole", wide=True)
        settings = [f"model.from_checkpoint={whole}"]
        # The tiny ChatGLM has three layers.
        return settings + ["tune.language.layers=[0, 2]"] * (family == "visualglm")
    if family == "mgm":
        return _mgm_settings(name, folder)
    return _xtuner_settings(name, folder)


def _mgm_settings(name: str, folder: Path) -> list[str]:
    write_mgm_parts(folder)
    parts = {
        "model.vision_tower.path": folder / "clip",
        "model.vision_tower_aux.path": folder / "aux",
        "model.language_model.path": folder / "gemma",
    }
    settings = [f"{key}={path}" for key, path in parts.items()]
    recipe = load_recipe(name).recipe
    if recipe.model.from_checkpoint is not None:
        return [f"model.from_checkpoint={folder / 'whole'}"]
    if recipe.model.connector.weights is not None:
        small = [*settings, "model.vision_tower_aux.size_px=128", "model.connector.weights=null"]
        model = build(draw(load_recipe(name, small).recipe), seed=0, dtype=torch.float32)
        state = {n: t for n, t in model.state_dict().items() if n.startswith("connector.")}
        (folder / "step").mkdir()
        save_file(state, folder / "step" / "weights.safetensors")
        settings.append(f"model.connector.weights={folder / 'step'}")
        return [*settings, "model.vision_tower_aux.size_px=128"]
    return [*settings, "model.vision_tower_aux.size_px=64"]


def _xtuner_settings(name: str, folder: Path) -> list[str]:
    language = folder / "internlm2"
    language.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / "internlm2" / file, language)
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    byte_tokenizer(specials, bos="<s>", eos="</s>").save_pretrained(language)
    tower = write_tower(folder / "tower")
    settings = [f"model.vision_tower.path={tower}", f"model.language_model.path={language}"]
    if load_recipe(name).recipe.model.from_checkpoint is None:
        return settings
    # Stage 2 goes on from XTuner's own checkpoint of stage 1.
    stage1 = load_recipe("xtuner/llava-internlm2-1.8b-pretrain", settings).recipe
    model = build(draw(stage1), seed=0, dtype=torch.float32)
    connector = model.get_submodule("connector").state_dict()
    state = {f"projector.model.{n}": t for n, t in connector.items()}
    torch.save({"state_dict": state, "meta": {"iter": 2181}}, folder / "iter_2181.pth")
    return [
        f"model.from_checkpoint={folder / 'iter_2181.pth'}",
        f"model.bases.vision_tower={tower}",
        f"model.bases.language_model={language}",
    ]

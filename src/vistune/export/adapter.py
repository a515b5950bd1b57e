"""Writes adapters as PEFT directories, with the connector beside them.

    <folder>/language_model/   PEFT adapter of the language model
    <folder>/vision_tower/     PEFT adapter of the vision tower, when it has one
    <folder>/connector.safetensors
    <folder>/tiles.safetensors  the newline of images in tiles
    <folder>/vistune.json

The base models are not copied: `adapter_config.json` names where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vistune.checkpoint.layouts.names import NEWLINE
from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.device.bits import quiet_kernel_notice
from vistune.errors import ModelError
from vistune.export.files import write_tokenizer
from vistune.models.compose import ComposedVLM
from vistune.models.tune.lora import adapter_layers
from vistune.recipe import ModelConfig

_PARTS = ("language_model", "vision_tower")


def write_adapter(model: ComposedVLM, encoder: Encoder, manifest: Manifest, folder: Path) -> None:
    """Writes the adapters and the connector of a model.

    Args:
        model: With its adapters, not merged.
        encoder: Its encoder.
        manifest: The run's description; its parts are the adapters' bases.
        folder: An empty directory.

    Raises:
        ModelError: There are no adapters, or a part was trained in full besides.
    """
    layers = adapter_layers(model)
    whole = [
        role
        for role in ("vision", "language", "head")
        if manifest.tune.get(role, {}).get("mode") == "full"
    ]
    if not layers or whole:
        raise ModelError(
            f"the {' and '.join(whole)} weights were trained in full; an adapter cannot hold them"
            if whole
            else "this run trained no adapters",
            fix="export with --to hf or --to vistune",
        )
    bases = _bases(manifest.parts)
    for part in _PARTS:
        if any(name.startswith(f"{part}.") for name in layers):
            write_peft(model.get_submodule(part), base=bases[part], folder=folder / part)
    state = {
        f"connector.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in model.connector.state_dict().items()
    }
    save_file(state, folder / "connector.safetensors", metadata={"format": "pt"})
    if model.tiles is not None:
        newline = {NEWLINE: model.tiles.image_newline.detach().cpu().contiguous()}
        save_file(newline, folder / "tiles.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, encoder)
    write_manifest(folder, manifest)


def _bases(parts: ModelConfig | None) -> dict[str, str]:
    if parts is None or parts.language_model is None or parts.vision_tower is None:
        whole = "" if parts is None or parts.from_checkpoint is None else parts.from_checkpoint
        return dict.fromkeys(_PARTS, whole)
    return {"language_model": parts.language_model.path, "vision_tower": parts.vision_tower.path}


def adapter_targets(part: nn.Module) -> list[str]:
    """Returns the adapted layers by their last names where these are unmistakable, else in full.

    Args:
        part: A model or a part of one, adapters not merged.
    """
    adapted = list(adapter_layers(part))
    inside = tuple(f"{name}." for name in adapted)
    # Peft adapts convolutions and embeddings too.
    others = [
        name
        for name, module in part.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and not name.startswith(inside)
        and name not in adapted
    ]
    return target_names(adapted, others)


def target_names(adapted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns adapted modules by their last names where these are unmistakable, else in full.

    Args:
        adapted: Paths of the modules with adapters.
        others: Paths of the modules without that PEFT could adapt.
    """
    adapted = list(adapted)
    short = {name.rpartition(".")[2] for name in adapted}
    mistakable = any(name.rpartition(".")[2] in short for name in others)
    return adapted if mistakable else sorted(short)


def write_peft(part: nn.Module, *, base: str, folder: Path) -> None:
    """Writes the adapters inside a part as a PEFT directory.

    Args:
        part: The language model or the tower, adapters not merged.
        base: Where its own weights are.
        folder: Made here.
    """
    quiet_kernel_notice()
    from peft import get_peft_model_state_dict

    folder.mkdir()
    owner: Any = part
    config = owner.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = adapter_targets(part)
    config.save_pretrained(folder)
    # By default it asks the hub how large the base's vocabulary is; only linear layers are adapted.
    found = get_peft_model_state_dict(part, adapter_name="default", save_embedding_layers=False)
    state = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in found.items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

"""Writes what a run trained of one of transformers' own models as one PEFT adapter directory.

    <folder>/adapter_config.json, adapter_model.safetensors
    <folder>/tokenizer and processor files, vistune.json

`PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)` is the model:
adapters carry the names of transformers' own modules, and a connector that trained in full lies
among them as modules to save. The base model is not copied.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vistune.checkpoint.manifest import Manifest, write_manifest
from vistune.data.encode import Encoder
from vistune.device.bits import quiet_kernel_notice
from vistune.errors import ModelError
from vistune.export.adapter import adapter_targets
from vistune.export.native import write_processor
from vistune.models.native import NativeVLM
from vistune.models.native.model import INNER
from vistune.models.tune.lora import adapter_layers
from vistune.recipe import TuneConfig
from vistune.recipe.schema import FullTune, LoraTune, RoleTune
from vistune.types import RoleName

_INNER = f"{INNER}."
_WHOLE: tuple[RoleName, ...] = ("vision", "language", "head")
_ONE_FOR_ALL = ("rslora", "dora", "dropout")


def write_native_adapter(
    model: NativeVLM,
    encoder: Encoder,
    manifest: Manifest,
    folder: Path,
    *,
    origin: Path | None,
    with_connector: bool,
) -> None:
    """Writes the adapters of a model, and its connector where that trained.

    Args:
        model: With its adapters, not merged.
        encoder: Its encoder.
        manifest: The run's description; its parts name the base model.
        folder: An empty directory.
        origin: Where the base's processor files are read.
        with_connector: Whether an earlier run trained the connector.

    Raises:
        ModelError: There are no adapters, or something trained that an adapter cannot hold.
    """
    tune = TuneConfig.model_validate(manifest.tune)
    roles = _adapted_roles(tune)
    with_connector = with_connector or isinstance(tune.connector, FullTune)
    saved = _saved_modules(model) if with_connector else []
    base = None if manifest.parts is None else manifest.parts.from_checkpoint
    assert base is not None
    _write_config(model, roles, saved, base=base, folder=folder)
    save_file(_state(model, saved), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_processor(model, encoder, folder, origin=origin)
    write_manifest(folder, manifest)


def _adapted_roles(tune: TuneConfig) -> dict[RoleName, LoraTune]:
    whole = [role for role in _WHOLE if isinstance(getattr(tune, role), FullTune)]
    parts: dict[RoleName, RoleTune] = {"language": tune.language, "vision": tune.vision}
    adapted = {role: part for role, part in parts.items() if isinstance(part, LoraTune)}
    if whole or not adapted:
        raise ModelError(
            f"the {' and '.join(whole)} weights were trained in full; an adapter cannot hold them"
            if whole
            else "this run trained no adapters",
            fix="export with --to hf or --to vistune",
        )
    first, *others = adapted.values()
    differing = [
        name
        for name in _ONE_FOR_ALL
        if any(getattr(part, name) != getattr(first, name) for part in others)
    ]
    if differing:
        raise ModelError(
            "one PEFT adapter has one setting for all its layers",
            where=", ".join(f"tune.{role}.{name}" for role in adapted for name in differing),
            fix="export with --to hf or --to vistune",
        )
    return adapted


def _saved_modules(model: NativeVLM) -> list[str]:
    """Returns the connector's modules by their names in transformers' model, lists taken apart.

    Raises:
        ModelError: A weight of it lies in no module of its own.
    """
    found: list[str] = []
    named = dict(model.named_modules())
    for prefix in model.module_map.connector:
        if prefix not in named:
            loose = [name for name, _ in model.named_parameters() if name == prefix]
            if loose:
                raise ModelError(
                    "a weight of the connector is no module, which a PEFT adapter cannot hold",
                    where=loose[0].removeprefix(_INNER),
                    fix="export with --to hf or --to vistune",
                )
            continue  # this release of the model has no such module
        module = named[prefix]
        names = [prefix]
        if isinstance(module, nn.ModuleList):
            names = [f"{prefix}.{index}" for index in range(len(module))]
        found += [name.removeprefix(_INNER) for name in names if _has_weights(named[name])]
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _write_config(
    model: NativeVLM,
    roles: dict[RoleName, LoraTune],
    saved: list[str],
    *,
    base: str,
    folder: Path,
) -> None:
    quiet_kernel_notice()
    from peft import LoraConfig

    first, *others = roles
    lead = roles[first]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for role in others:
        if (roles[role].rank, roles[role].alpha) == (lead.rank, lead.alpha):
            continue
        for name in adapter_layers(model):
            if model.module_map.role_of(name) == role:
                exact = "^" + re.escape(name.removeprefix(_INNER))
                ranks[exact], alphas[exact] = roles[role].rank, roles[role].alpha
    config = LoraConfig(
        r=lead.rank,
        lora_alpha=lead.alpha,
        lora_dropout=lead.dropout,
        target_modules=adapter_targets(model.inner),
        use_rslora=lead.rslora,
        use_dora=lead.dora,
        bias="none",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(folder)


def _state(model: NativeVLM, saved: list[str]) -> dict[str, Tensor]:
    """Returns adapters and saved modules under the names PEFT gives them around transformers'."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if "peft_config" not in vars(module):
            continue
        lead = f"{name}." if name else ""
        owner: Any = module
        # By default it asks the hub how large the base's vocabulary is; no embedding is adapted.
        found = get_peft_model_state_dict(
            owner, adapter_name="default", save_embedding_layers=False
        )
        state |= {f"{lead}{key}".removeprefix(_INNER): tensor for key, tensor in found.items()}
    for module_name in saved:
        inside = model.inner.get_submodule(module_name).state_dict()
        state |= {f"{module_name}.{key}": tensor for key, tensor in inside.items()}
    return {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in state.items()
    }

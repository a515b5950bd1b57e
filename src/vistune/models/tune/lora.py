"""LoRA adapters inside one role's linear layers, by peft. It never matches names across roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vistune.device.bits import quiet_kernel_notice
from vistune.errors import ModelError
from vistune.models.contract import TunableModel
from vistune.recipe.schema import LoraTune
from vistune.types import RoleName

_SHOWN_NAMES = 12


def linear_layers(model: TunableModel, role: RoleName) -> list[str]:
    """Returns the full names of a role's linear layers, in order.

    A head tied to the input embeddings is left out: an adapter merged into it would change the
    embeddings too.
    """
    module_map = model.module_map
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) not in embeddings
        and module_map.role_of(name) == role
    ]


def target_layers(model: TunableModel, role: RoleName, tune: LoraTune) -> list[str]:
    """Returns the full names of the layers that get adapters.

    A target is the end of a name from one of its parts on, with `*`, `?` and `[...]` as in file
    names: `q_proj`, `self_attn.*`, `layers.0.*_proj`.

    Raises:
        ModelError: A target matches none of the role's linear layers.
    """
    layers = linear_layers(model, role)
    if tune.targets == "all_linear":
        chosen, unmatched = layers, [] if layers else ["all_linear"]
    else:
        found = {target: _matching(layers, target) for target in tune.targets}
        wanted = {name for names in found.values() for name in names}
        chosen = [name for name in layers if name in wanted]
        unmatched = sorted(target for target, names in found.items() if not names)
    if unmatched:
        last_names = sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(
            f"no linear layer of the role '{role}' is called {' or '.join(unmatched)}",
            where=f"tune.{role}.targets",
            expected=", ".join(last_names[:_SHOWN_NAMES]) + f"; or a pattern over names such as"
            f" {layers[0]}"
            if layers
            else "linear layers, of which it has none",
            fix=f"set tune.{role}.targets=all_linear",
        )
    return chosen if tune.layers is None else _in_layers(chosen, tune.layers, role)


def _matching(names: Sequence[str], target: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, f"*.{target}") or fnmatchcase(name, target)]


def _in_layers(names: list[str], layers: Sequence[int], role: RoleName) -> list[str]:
    """Returns the names that lie in some layers: the first number in a name is its layer's.

    Raises:
        ModelError: There is no such layer.
    """
    numbers = {name: next((p for p in name.split(".") if p.isdigit()), None) for name in names}
    there = {int(number) for number in numbers.values() if number is not None}
    missing = sorted(set(layers) - there)
    if missing:
        raise ModelError(
            f"the role '{role}' has no layer {missing[0]} with such targets",
            where=f"tune.{role}.layers",
            expected=f"numbers from 0 to {max(there)}" if there else "layers, of which it has none",
            fix=f"correct tune.{role}.layers, or leave it out",
        )
    return [name for name, number in numbers.items() if number and int(number) in layers]


def inject_lora(model: TunableModel, role: RoleName, tune: LoraTune, *, seed: int) -> None:
    """Puts adapters beside a role's linear layers, in place.

    Args:
        model: The model.
        role: `language` or `vision`.
        tune: Rank, scale and targets.
        seed: Seed of the adapters' first factor; the second starts at zero.

    Raises:
        ModelError: A target matches nothing, or the layers already carry adapters.
    """
    if any(model.module_map.role_of(name) == role for name in adapter_layers(model)):
        raise ModelError("this role already carries adapters", where=f"tune.{role}")
    layers = target_layers(model, role, tune)
    quiet_kernel_notice()
    from peft import LoraConfig, inject_adapter_in_model

    root, prefix = _root(model, role, layers)
    config = LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        # Peft takes a list as suffixes, which could match elsewhere; this must match in whole.
        target_modules="|".join(re.escape(name.removeprefix(prefix)) for name in layers),
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, root)
    found = [n for n in adapter_layers(model) if model.module_map.role_of(n) == role]
    assert set(found) == set(layers), "peft adapted other layers than it was given"


def adapter_layers(model: TunableModel | nn.Module) -> dict[str, Any]:
    """Returns the layers that carry adapters, by full name."""
    return {name: module for name, module in model.named_modules() if _is_adapter(module)}


def _is_adapter(module: nn.Module) -> bool:
    # Peft's layers, recognised without importing peft: its import costs seconds.
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _root(model: TunableModel, role: RoleName, layers: list[str]) -> tuple[nn.Module, str]:
    """Returns the module adapters are put into, and what its names lack of the full ones."""
    for prefix in model.module_map.prefixes(role):
        if all(name.startswith(f"{prefix}.") for name in layers):
            return model.get_submodule(prefix), f"{prefix}."
    return model.get_submodule(""), ""

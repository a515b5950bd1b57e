"""LoRA adapters inside one role's linear layers, by peft. It never matches names across roles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vistune.errors import ModelError
from vistune.models.compose import ComposedVLM
from vistune.recipe.schema import LoraTune
from vistune.types import RoleName

_SHOWN_NAMES = 12


def linear_layers(model: ComposedVLM, role: RoleName) -> list[str]:
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


def target_layers(model: ComposedVLM, role: RoleName, tune: LoraTune) -> list[str]:
    """Returns the full names of the layers that get adapters.

    Raises:
        ModelError: A target matches none of the role's linear layers.
    """
    layers = linear_layers(model, role)
    if tune.targets == "all_linear":
        chosen, unmatched = layers, [] if layers else ["all_linear"]
    else:
        wanted = set(tune.targets)
        chosen = [name for name in layers if name.rpartition(".")[2] in wanted]
        unmatched = sorted(wanted - {name.rpartition(".")[2] for name in chosen})
    if unmatched:
        last_names = sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(
            f"no linear layer of the role '{role}' is called {' or '.join(unmatched)}",
            where=f"tune.{role}.targets",
            expected=", ".join(last_names[:_SHOWN_NAMES]) or "linear layers, of which it has none",
            fix=f"set tune.{role}.targets=all_linear",
        )
    return chosen


def inject_lora(model: ComposedVLM, role: RoleName, tune: LoraTune, *, seed: int) -> None:
    """Puts adapters beside a role's linear layers, in place.

    Args:
        model: The model.
        role: `language` or `vision`.
        tune: Rank, scale and targets.
        seed: Seed of the adapters' first factor; the second starts at zero.

    Raises:
        ModelError: A target matches nothing, or the layers already carry adapters.
    """
    layers = target_layers(model, role, tune)
    if any(hasattr(model.get_submodule(name), "base_layer") for name in layers):
        raise ModelError("this role already carries adapters", where=f"tune.{role}")
    from peft import LoraConfig, inject_adapter_in_model

    part, prefix = _part(model, role)
    config = LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        target_modules=[name.removeprefix(prefix) for name in layers],
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, part)
    found = sorted(name for name, module in model.named_modules() if _is_adapter(module))
    assert set(layers) <= set(found), "peft left out layers it was given"


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers that carry adapters, by full name."""
    return {name: module for name, module in model.named_modules() if _is_adapter(module)}


def _is_adapter(module: nn.Module) -> bool:
    # Peft's layers, recognised without importing peft: its import costs seconds.
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _part(model: ComposedVLM, role: RoleName) -> tuple[nn.Module, str]:
    if role == "vision":
        return model.vision_tower, "vision_tower."
    assert role == "language"
    return model.language_model, "language_model."

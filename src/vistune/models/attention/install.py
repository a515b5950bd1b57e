"""Chooses how a model's attention is computed, puts it in place, and says what and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from vistune.device.attention import (
    AttentionChoice,
    AttentionNeeds,
    AttentionSupport,
    choose_attention,
    choose_row_attention,
    why_not,
)
from vistune.errors import ModelError
from vistune.models.attention.auto import AUTO, BackendName, backend_of
from vistune.models.attention.contract import Backend
from vistune.models.attention.interface import (
    is_packed_name,
    register_packed_attention,
    register_row_attention,
)
from vistune.models.attention.patches import is_patch_name, register_patch_attention
from vistune.models.contract import ModuleMap


class AttendingModel(Protocol):
    """What is asked of a model here."""

    @property
    def module_map(self) -> ModuleMap:
        """Role -> modules."""
        ...


@dataclass(frozen=True)
class InstalledAttention:
    """How a model's attention is computed.

    Args:
        language: The language model's, over packed rows.
        vision: The vision tower's.
        backend: The language model's, for layers that do not ask transformers' interface.
    """

    language: AttentionChoice
    vision: AttentionChoice
    backend: Backend

    def __str__(self) -> str:
        return f"attention, language model: {self.language}\nattention, vision tower: {self.vision}"

    def to_json(self) -> dict[str, dict[str, str]]:
        """Returns both choices with their reasons, for the record of a run."""
        return {
            "language": {"name": self.language.name, "reason": self.language.reason},
            "vision": {"name": self.vision.name, "reason": self.vision.reason},
        }


def install_attention(
    model: AttendingModel,
    *,
    wanted: BackendName,
    dtype: torch.dtype,
    device: torch.device,
    drops_weights: bool = True,
    opaque: bool = False,
) -> InstalledAttention:
    """Chooses and sets attention for every part of a model that takes it from transformers.

    Args:
        model: Its configs are changed in place.
        wanted: `train.attention` of the recipe.
        dtype: Format of the arithmetic.
        device: Where it will run.
        drops_weights: Whether the language model trains, so that its dropout acts.
        opaque: Keep torch's compiler out of it, for layers that are compiled around it.

    Raises:
        DeviceError: The one asked for cannot serve the language model.
        ModelError: It is asked for, and the model brings its own.
        MissingExtraError: Its package is not installed.
    """
    assert isinstance(model, nn.Module)
    support = AttentionSupport.of(device)
    vision = _install_rows(model, wanted, support, dtype)
    configs = _configs(model)
    if not configs:
        if wanted != "auto":
            raise ModelError(
                f"{type(model).__name__} brings attention of its own",
                where="train.attention",
                got=wanted,
                fix="set train.attention=auto",
            )
        return InstalledAttention(AttentionChoice("own", "the model's layers"), vision, AUTO)
    needs = _needs(configs, dtype, drops_weights=drops_weights)
    choice = choose_attention(wanted, support, needs)
    assert choice.name != "own"
    registered = register_packed_attention(choice.name, opaque=opaque)
    for config in configs:
        config._attn_implementation = registered
    return InstalledAttention(choice, vision, backend_of(choice.name))


def _configs(model: nn.Module) -> list[Any]:
    """Returns the configs of transformers parts that attend over packed rows."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if is_packed_name(getattr(config, "_attn_implementation", None)):
            found[id(config)] = config
    return list(found.values())


def _needs(configs: list[Any], dtype: torch.dtype, *, drops_weights: bool) -> AttentionNeeds:
    config = max(configs, key=_head_dim)
    drops = any(_dropout(c) > 0 for c in configs) and drops_weights
    capped = any(getattr(c, "attn_logit_softcapping", None) is not None for c in configs)
    return AttentionNeeds(_head_dim(config), dtype, softcap=capped, dropout=drops)


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _dropout(config: Any) -> float:
    names = ("attention_dropout", "attn_pdrop")
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)


def _install_rows(
    model: Any, wanted: BackendName, support: AttentionSupport, dtype: torch.dtype
) -> AttentionChoice:
    prefixes = tuple(prefix.rstrip(".") + "." for prefix in model.module_map.prefixes("vision"))
    towers = {
        id(module.config): module.config
        for name, module in model.named_modules()
        if (name + ".").startswith(prefixes)
        and hasattr(getattr(module, "config", None), "num_attention_heads")
    }
    names = {key: getattr(c, "_attn_implementation", None) for key, c in towers.items()}
    laid_out = [c for key, c in towers.items() if is_patch_name(names[key])]
    if laid_out:
        return _install_patches(laid_out, wanted, support, dtype)
    configs = {key: c for key, c in towers.items() if names[key] == "sdpa"}
    if not configs:
        return AttentionChoice("own", "the tower's layers")
    needs = _needs(list(configs.values()), dtype, drops_weights=True)
    choice = choose_row_attention(wanted, support, needs)
    if choice.name != "own" and choice.name != "sdpa":
        registered = register_row_attention(choice.name)
        for config in configs.values():
            config._attn_implementation = registered
    return choice


def _install_patches(
    configs: list[Any], wanted: BackendName, support: AttentionSupport, dtype: torch.dtype
) -> AttentionChoice:
    needs = _needs(configs, dtype, drops_weights=True)
    # The other kernels are for causal rows, or have nothing to add.
    best: Literal["varlen", "flash_attn"] = "flash_attn" if wanted == "flash_attn" else "varlen"
    obstacle = why_not(best, support, needs)
    name: Literal["sdpa", "varlen", "flash_attn"] = best
    if wanted == "sdpa" or obstacle is not None:
        name = "sdpa"
    # `auto` looks at every call: a head of another width than the config says is no error.
    registered = register_patch_attention("auto" if name == "varlen" else name)
    for config in configs:
        config._attn_implementation = registered
    reason = "images of any size end to end"
    if wanted == best and obstacle is not None:
        reason += f"; not {best}: {obstacle}"
    elif wanted not in ("auto", name):
        reason += f"; {wanted} is for the language model's causal rows"
    return AttentionChoice(name, reason)

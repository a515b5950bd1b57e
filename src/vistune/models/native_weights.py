"""Bytes of the weights of one of transformers' own models, and of what a step makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from vistune.models.memory import RoleBytes, frozen_bytes
from vistune.models.native.model import NativeVLM
from vistune.models.recompute import decoder_layers
from vistune.models.tune.quantize import QUANTISED_ROLES, frozen_linear
from vistune.recipe import TrainConfig, TuneConfig
from vistune.recipe.schema import FrozenFormat
from vistune.recipe.sizes import resident_optimizer_bytes
from vistune.types import ROLES, RoleName


@dataclass(frozen=True)
class PassingBytes:
    """Bytes that are made of weights on the way through a step.

    Args:
        casts: 16-bit copies of trained weights.
        gradients: Gradients of them.
        at_work: The largest of them before it is fp32; or a frozen weight taken out of its compact
            form.
    """

    casts: int
    gradients: int
    at_work: int


def layer_passing(model: NativeVLM, *, tune: TuneConfig, dtype: torch.dtype) -> PassingBytes:
    """Returns what is made of the weights of one decoder layer.

    Args:
        model: Tuned, of tensors without storage.
        tune: What trains.
        dtype: Format of the arithmetic.
    """
    layer = decoder_layers(model)[0]
    made = _passing(layer, model, dtype=dtype)
    if tune.held_format("language") == "same":
        return made
    # A weight held in 4 or 8 bits is multiplied by in the arithmetic's format.
    matrices = (m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    return replace(made, at_work=max(made.at_work, dtype.itemsize * max(matrices)))


def head_passing(model: NativeVLM, *, dtype: torch.dtype) -> PassingBytes:
    """Returns what is made of the weights of the output head.

    Args:
        model: Tuned, of tensors without storage.
        dtype: Format of the arithmetic.
    """
    return _passing(model.get_output_embeddings(), model, dtype=dtype)


def _passing(module: nn.Module, model: NativeVLM, *, dtype: torch.dtype) -> PassingBytes:
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    return PassingBytes(
        casts=_casts(module.parameters(), _tables(model), dtype=dtype),
        gradients=4 * sum(trained),
        at_work=dtype.itemsize * max(trained, default=0),
    )


def _tables(model: NativeVLM) -> frozenset[int]:
    """Returns the ids of weights that are looked up in and never multiplied by."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return frozenset(tables - {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)})


def _casts(
    parameters: Iterable[nn.Parameter], tables: frozenset[int], *, dtype: torch.dtype
) -> int:
    """Returns the bytes of 16-bit copies that the forward pass makes of trained weights."""
    if dtype is torch.float32:
        return 0
    return sum(
        p.numel() * dtype.itemsize
        for p in parameters
        if p.requires_grad and p.dim() > 1 and id(p) not in tables
    )


def role_bytes(
    model: NativeVLM, *, tune: TuneConfig, train: TrainConfig, dtype: torch.dtype
) -> dict[RoleName, RoleBytes]:
    """Adds up parameters by role, each counted as it will be held.

    Args:
        model: Tuned, of tensors without storage.
        tune: What trains.
        train: Optimizer.
        dtype: Format of frozen weights.
    """
    compact, tables = _compact(model, tune), _tables(model)
    module_map = model.module_map
    found = {role: RoleBytes() for role in ROLES}
    for name, parameter in model.named_parameters():
        role, count = module_map.role_of(name), parameter.numel()
        before = found[role]
        if not parameter.requires_grad:
            held = frozen_bytes(parameter, compact.get(id(parameter), "same"))
            found[role] = replace(before, weights=before.weights + held)
            continue
        found[role] = RoleBytes(
            before.weights + 4 * count,
            before.gradients + 4 * count,
            before.optimizer + resident_optimizer_bytes(count, train),
            before.casts + _casts([parameter], tables, dtype=dtype),
        )
    return found


def _compact(model: NativeVLM, tune: TuneConfig) -> dict[int, FrozenFormat]:
    """Returns how the weights are held that `models.tune.quantize` may hold in fewer bits."""
    return {
        id(linear.weight): tune.held_format(role)
        for role in QUANTISED_ROLES
        for _, linear in frozen_linear(model, role)
    }

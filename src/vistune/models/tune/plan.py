"""Applies a recipe's `tune` to a model and answers what trains, in which group, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistune.errors import ModelError, WeightsError
from vistune.models.contract import TunableModel
from vistune.models.tune.lora import inject_lora
from vistune.models.weights import check_keys
from vistune.recipe import TrainConfig, TuneConfig
from vistune.recipe.schema import FreezeTune, FullTune, LoraTune
from vistune.types import ROLES, RoleName

_ADAPTER_PARTS = frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters with one learning rate and weight decay.

    Args:
        role: The role they play.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        names: Parameter names.
    """

    role: RoleName
    lr: float
    weight_decay: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class TuningRow:
    """One line of the table of what trains.

    Args:
        role: The role.
        module: Module path; the role's own line has the path of the role.
        depth: 0 for a role, 1 for a module inside it.
        num_total: Parameters, adapters included.
        num_trainable: Of them, how many train.
        mode: freeze, full or lora; "absent" for a tied head.
        lr: Peak learning rate, None when nothing trains or the recipe's default applies.
    """

    role: RoleName
    module: str
    depth: int
    num_total: int
    num_trainable: int
    mode: str
    lr: float | None


@dataclass(frozen=True)
class Tuning:
    """A model whose trained parameters are chosen.

    Args:
        model: The model, changed in place.
        tune: What was asked for.
    """

    model: TunableModel
    tune: TuneConfig

    def groups(self, train: TrainConfig) -> list[ParamGroup]:
        """Returns the optimizer's parameter groups; norms and biases are without decay.

        Args:
            train: Learning rate and decay of roles that name none.
        """
        by_role: dict[RoleName, tuple[list[str], list[str]]] = {r: ([], []) for r in ROLES}
        module_map = self.model.module_map
        plain = _without_decay(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                by_role[module_map.role_of(name)][name in plain].append(name)
        groups = []
        for role in ROLES:
            tune = getattr(self.tune, role)
            if isinstance(tune, FreezeTune):
                continue
            lr = train.lr if tune.lr is None else tune.lr
            decay = train.weight_decay if tune.weight_decay is None else tune.weight_decay
            decayed, undecayed = by_role[role]
            if decay == 0.0:
                decayed, undecayed = _in_order(self.model, {*decayed, *undecayed}), []
            groups += [
                ParamGroup(role, lr, rate, tuple(names))
                for rate, names in ((decay, decayed), (0.0, undecayed))
                if names
            ]
        return groups

    def table(self) -> list[TuningRow]:
        """Returns the table of roles and their modules with parameter counts."""
        module_map = self.model.module_map
        counts: dict[RoleName, dict[str, list[int]]] = {role: {} for role in ROLES}
        for name, parameter in self.model.named_parameters():
            role = module_map.role_of(name)
            module = _second_level(name, module_map.prefixes(role))
            cell = counts[role].setdefault(module, [0, 0])
            cell[0] += parameter.numel()
            cell[1] += parameter.numel() if parameter.requires_grad else 0
        rows = []
        for role in ROLES:
            tune = getattr(self.tune, role)
            mode = tune.mode if counts[role] else "absent"
            lr = None if isinstance(tune, FreezeTune) else tune.lr
            modules = counts[role]
            totals = [sum(cell[i] for cell in modules.values()) for i in (0, 1)]
            where = ", ".join(module_map.prefixes(role))
            rows.append(TuningRow(role, where, 0, totals[0], totals[1], mode, lr))
            if len(modules) > 1:
                rows += [
                    TuningRow(role, name, 1, cell[0], cell[1], mode, lr)
                    for name, cell in modules.items()
                ]
        return rows

    @property
    def num_trainable(self) -> int:
        """Parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def apply_tuning(model: TunableModel, tune: TuneConfig, *, seed: int) -> Tuning:
    """Freezes, unfreezes and adds adapters as a recipe says; trained weights become fp32.

    Args:
        model: Changed in place.
        tune: What trains.
        seed: Seed of adapters.

    Raises:
        ModelError: A role cannot train in the way asked for, or nothing would train.
    """
    module_map = model.module_map
    if not module_map.head and isinstance(tune.head, FullTune):
        raise ModelError(
            "this language model's head is tied to its input embeddings, so it has no head of"
            " its own to train",
            where="tune.head.mode",
            fix="set tune.head.mode=freeze; tune.language.mode=full trains the tied weight",
        )
    named = [name for name, _ in model.named_parameters()]
    has_connector = any(module_map.role_of(name) == "connector" for name in named)
    if isinstance(tune.connector, FullTune) and not has_connector:
        raise ModelError(
            "an identity connector has no weights to train",
            where="tune.connector.mode",
            fix="set tune.connector.mode=freeze",
        )
    model.requires_grad_(False)
    roles: tuple[RoleName, ...] = ("vision", "language")
    for role in roles:
        part_tune = getattr(tune, role)
        if isinstance(part_tune, LoraTune):
            inject_lora(model, role, part_tune, seed=seed)
    unreached = model.never_trained
    for name, parameter in model.named_parameters():
        part_tune = getattr(tune, module_map.role_of(name))
        adapter = not _ADAPTER_PARTS.isdisjoint(name.split("."))
        trains = part_tune.mode == "full" or (part_tune.mode == "lora" and adapter)
        parameter.requires_grad_(trains and name not in unreached)
        # What no gradient reaches may still be run, on what the rest of its role makes.
        if parameter.requires_grad or part_tune.mode == "full":
            parameter.data = parameter.data.float()
    tuning = Tuning(model, tune)
    if tuning.num_trainable == 0:
        raise ModelError(
            "no weight of the model would train", where="tune", fix="set tune.<role>.mode"
        )
    return tuning


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the trained parameters on the CPU, by name."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies trained parameters into a model that was tuned in the same way.

    Args:
        model: After `apply_tuning`.
        state: From `trainable_state`.

    Raises:
        WeightsError: Names or shapes differ.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        check_keys(
            missing=own.keys() - state.keys(),
            unexpected=state.keys() - own.keys(),
            mismatched=[
                (name, tensor.shape, own[name].shape)
                for name, tensor in state.items()
                if name in own and tensor.shape != own[name].shape
            ],
            where="trained weights",
        )
    except WeightsError as error:
        raise WeightsError(
            error.what,
            where=error.where,
            got=error.got,
            fix="load them with the model parts and the `tune` section they were trained with",
        ) from None
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _without_decay(model: TunableModel) -> set[str]:
    """Names of parameters that never decay: vectors and scalars, that is norms, biases, scales."""
    return {name for name, p in model.named_parameters() if p.dim() < 2}


def _in_order(model: TunableModel, names: set[str]) -> list[str]:
    return [name for name, _ in model.named_parameters() if name in names]


def _second_level(name: str, prefixes: tuple[str, ...]) -> str:
    """The module under the role's own that a parameter lies in: `language_model.model.layers`."""
    prefix = max((p for p in prefixes if name.startswith(p + ".")), key=len, default="")
    inner = name[len(prefix) + 1 :].split(".")[:-1]
    return (
        ".".join([prefix, *inner[:2]])
        if prefix == "language_model"
        else ".".join([prefix, *inner[:1]])
    )

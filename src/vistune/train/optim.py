"""AdamW over the trained parameters, grouped by role: in 32 or 8 bit, on the device or offloaded.

Frozen weights have no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from vistune.device.bits import import_bitsandbytes
from vistune.recipe import TrainConfig
from vistune.train.offload import OffloadedAdamW
from vistune.types import RoleName

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class ParameterGroup(Protocol):
    """Trained parameters with one learning rate and weight decay (made by `models.tune`)."""

    @property
    def role(self) -> RoleName:
        """The role they play."""
        ...

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Parameter names of the model."""
        ...


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
) -> torch.optim.Optimizer:
    """Makes AdamW, fused where the device has it.

    Args:
        parameters: Named parameters of the model, on their device.
        groups: Which of them train, and how fast.
        train: Betas and epsilon.

    Returns:
        The optimizer; each of its groups carries `names`, `role` and `peak_lr`.

    Raises:
        MissingExtraError: 8-bit state is asked for and bitsandbytes is not installed.
    """
    known = dict(parameters)
    rows: list[dict[str, Any]] = [
        {
            "params": [known[name] for name in group.names],
            "names": list(group.names),
            "role": group.role,
            "lr": group.lr,
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if train.optimizer == "adamw_8bit":
        bitsandbytes = import_bitsandbytes("train.optimizer=adamw_8bit")
        made = bitsandbytes.optim.AdamW8bit(rows, betas=train.betas, eps=train.eps)
        assert isinstance(made, torch.optim.Optimizer)
        return made
    if train.offload.optimizer:
        return OffloadedAdamW(rows, betas=train.betas, eps=train.eps)
    kinds = {p.device.type for row in rows for p in row["params"]}
    return torch.optim.AdamW(
        rows,
        betas=train.betas,
        eps=train.eps,
        fused=all(kind in _FUSED_DEVICES for kind in kinds),
    )


def peak_lrs(groups: Sequence[ParameterGroup]) -> dict[str, float]:
    """Returns the peak learning rate of each role that trains."""
    return {group.role: group.lr for group in groups}

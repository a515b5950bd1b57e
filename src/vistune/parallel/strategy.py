"""The contract between the loop and a way of spreading it: six methods, nothing else.

The loop divides every loss by the global count of target tokens itself, so a strategy adds
gradients over processes and never averages them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import nn

from vistune.parallel.world import World

OptimizerState: TypeAlias = Mapping[str, Mapping[str, torch.Tensor]]
"""Parameter name -> name of the moment -> CPU tensor. By name, so that it does not depend on how
parameters are grouped, wrapped or sharded."""

OptimizerFactory: TypeAlias = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimizer over the trained parameters of the module given to `prepare`, once the
strategy has changed it in place. Every parameter group carries `names` (one per parameter) and
`peak_lr`."""


@dataclass(frozen=True)
class StrategyState:
    """What a strategy adds to a checkpoint, whole (gathered) and on the CPU.

    Args:
        weights: Trained parameters by name.
        optimizer: Optimizer state by parameter name.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]


class Strategy(Protocol):
    """One way of running an optimizer step over the processes of a run."""

    world: World

    def prepare(
        self,
        module: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        restored: OptimizerState | None = None,
    ) -> nn.Module:
        """Wraps the module and makes its optimizer.

        Args:
            module: On its device, weights in place; its forward is all that is ever called.
            make_optimizer: Called once, on the same module.
            restored: Optimizer state of a checkpoint.

        Returns:
            The module to call.

        Raises:
            CheckpointError: `restored` does not fit the trained parameters.
        """
        ...

    def no_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Returns the context of one row's forward and backward pass.

        Args:
            last: Whether it is the step's last row, after which gradients must be whole.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss` (already divided by the global count of targets)."""
        ...

    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        """Scales the gradients to at most `max_norm` and returns their global norm before that.

        Args:
            max_norm: Largest norm, or None to measure only.

        Returns:
            float32 scalar on the device; reading it is left to the caller.
        """
        ...

    def step(self, *, lr_factor: float | None) -> None:
        """Updates the weights and clears the gradients.

        Args:
            lr_factor: Fraction of each group's peak learning rate; None clears the gradients
                without updating anything.
        """
        ...

    def state(self) -> StrategyState:
        """Returns weights and optimizer state for a checkpoint; called on every process."""
        ...

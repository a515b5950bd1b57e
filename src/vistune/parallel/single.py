"""One process, one device: the plain case, and the reference the other strategies must equal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vistune.errors import CheckpointError
from vistune.parallel.strategy import OptimizerFactory, OptimizerState, StrategyState
from vistune.parallel.world import World


class SingleProcess:
    """Runs the whole step in this process."""

    def __init__(self) -> None:
        self.world = World()
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; there is one after `prepare`."""
        assert self._optimizer is not None, "prepare was not called"
        return self._optimizer

    def prepare(
        self,
        module: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        restored: OptimizerState | None = None,
    ) -> nn.Module:
        """Makes the optimizer; the module stays as it is. See `Strategy.prepare`."""
        self._optimizer = make_optimizer(module)
        self._parameters = named_trained(self._optimizer)
        if restored is not None:
            restore_optimizer(self._optimizer, restored)
        return module

    def no_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Returns a context that does nothing: there is no one to synchronise with."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`."""
        torch.autograd.backward(loss)

    def clip_grad_norm(self, max_norm: float | None) -> torch.Tensor:
        """Clips and returns the norm of all gradients. See `Strategy.clip_grad_norm`."""
        parameters = list(self._parameters.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, *, lr_factor: float | None) -> None:
        """Updates the weights and clears the gradients. See `Strategy.step`."""
        if lr_factor is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> StrategyState:
        """Returns copies of the trained weights and of the optimizer state, on the CPU."""
        weights = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()}
        return StrategyState(weights=weights, optimizer=optimizer_state(self.optimizer))


def named_trained(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the optimizer's parameters by name, in its own order."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Returns copies of the optimizer's state by parameter name, on the CPU."""
    return {
        name: {
            key: torch.as_tensor(value).detach().to("cpu", copy=True)
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in named_trained(optimizer).items()
        if parameter in optimizer.state
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, restored: OptimizerState) -> None:
    """Puts a checkpoint's state into a fresh optimizer.

    Raises:
        CheckpointError: The state is not that of these parameters.
    """
    parameters = named_trained(optimizer)
    unknown = sorted(set(restored) - set(parameters))
    missing = sorted(set(parameters) - set(restored)) if restored else []
    if unknown or missing:
        raise CheckpointError(
            "the optimizer state is not that of the parameters that train now",
            got=f"without a parameter: {unknown[:3]}; without state: {missing[:3]}",
            fix="resume with the recipe and the vistune version of the run",
        )
    for name, entries in restored.items():
        _require_shape(name, parameters[name], entries)
    # `load_state_dict` places each entry as the optimizer's variant (fused or not) wants it.
    numbered = {name: index for index, name in enumerate(parameters)}
    own = optimizer.state_dict()
    own["state"] = {numbered[name]: _as_kept(entries) for name, entries in restored.items()}
    optimizer.load_state_dict(own)


def _as_kept(entries: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns a parameter's state as its optimizer keeps it: the 8-bit one counts in integers."""
    kept: dict[str, Any] = dict(entries)
    if "state1" in kept and "step" in kept:
        kept["step"] = int(kept["step"])
    return kept


_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""State that is as large as its parameter; 8-bit moments have small tables of scales besides."""


def _require_shape(name: str, parameter: torch.Tensor, entries: Mapping[str, torch.Tensor]) -> None:
    for key, value in entries.items():
        if key in _MOMENTS and value.shape != parameter.shape:
            raise CheckpointError(
                f"the optimizer's '{key}' has another shape than its parameter",
                where=name,
                got=tuple(value.shape),
                expected=tuple(parameter.shape),
            )

"""What a run must remember to go on as if it had never stopped: counters and random states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: Optimizer updates done.
        data_step: Steps of data consumed: `step`, skipped steps and steps without targets.
        skipped_steps: Steps skipped because loss or gradient norm was not finite.
        num_samples: Samples seen.
        num_tokens: Tokens seen, image tokens included.
        num_target_tokens: Target tokens learnt from.
        rejected: Distinct rows that could not be read while training, as in the quarantine.
    """

    step: int = 0
    data_step: int = 0
    skipped_steps: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """Returns the counters as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Returns the counters of a checkpoint."""
        return cls(**state)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of every random generator that training draws from.

    Args:
        device: The device whose generator is included.

    Returns:
        Tensors, numbers and lists only, so that it can be read without running code.
    """
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    _, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts every random generator into a state from `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)

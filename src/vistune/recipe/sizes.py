"""Sizes that follow from settings alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from vistune.recipe.schema import TrainConfig

LOGITS_PER_CHUNK = 1 << 26
"""Logits held at once: 256 MiB in float32. With a vocabulary of 32,000 that is 2,097 targets."""

OFFLOAD_PIECE_WEIGHTS = 1 << 24
"""Weights whose offloaded optimizer state is on the device at a time: 128 MiB."""


def optimizer_bytes(count: int, optimizer: str) -> int:
    """Returns the bytes of AdamW's two moments for `count` trained weights.

    Args:
        count: Weights.
        optimizer: `train.optimizer`: 8 bytes a weight, or with 8 bits 2 and two fp32 scales for
            each 256.
    """
    if optimizer == "adamw_8bit":
        return 2 * count + 2 * 4 * -(-count // 256)
    return 8 * count


def resident_optimizer_bytes(count: int, train: TrainConfig) -> int:
    """Returns the bytes of an optimizer's state that stay on the device.

    Args:
        count: Trained weights.
        train: Which optimizer, and whether its state is offloaded.
    """
    return 0 if train.offload.optimizer else optimizer_bytes(count, train.optimizer)


def visiting_optimizer_bytes(count: int, train: TrainConfig) -> int:
    """Returns the most bytes of offloaded state that are on the device during an update.

    Args:
        count: Trained weights.
        train: Whether the state is offloaded: one piece in use, one coming, one going.
    """
    return 3 * 8 * min(count, OFFLOAD_PIECE_WEIGHTS) if train.offload.optimizer else 0


def num_steps(train: TrainConfig, steps_per_epoch: Callable[[int], int]) -> int:
    """Returns the optimizer steps a recipe asks for; a fraction of an epoch is rounded up.

    Args:
        train: The length of the run, in steps or epochs.
        steps_per_epoch: Steps of an epoch, by its number.
    """
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    whole = int(train.epochs)
    steps = sum(steps_per_epoch(epoch) for epoch in range(whole))
    rest = train.epochs - whole
    if rest == 0:
        return steps
    # Rounded first: 0.1 of 30 steps is a hair above 3 in floating point and must not become 4.
    return steps + math.ceil(round(rest * steps_per_epoch(whole), 6))

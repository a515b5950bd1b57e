"""The learning rate as a pure function of the step, so that resuming needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vistune.recipe import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """A warm-up and what follows it.

    Args:
        shape: Curve after the warm-up.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps in which the rate rises linearly from 0.
        min_factor: Where cosine and linear end, as a fraction of the peak.
    """

    shape: Literal["cosine", "linear", "constant"]
    total_steps: int
    warmup_steps: int
    min_factor: float = 0.0

    @classmethod
    def of(cls, train: TrainConfig, *, total_steps: int) -> Schedule:
        """Returns the schedule of a recipe; the warm-up is rounded up to whole steps."""
        # The product is rounded first: 0.03 * 100 is a hair above 3 and must not become 4.
        warmup_steps = math.ceil(round(train.warmup_frac * total_steps, 6))
        return cls(train.schedule, total_steps, warmup_steps, train.min_lr_frac)

    def factor(self, step: int) -> float:
        """Returns the fraction of the peak learning rate of the update after `step` updates.

        Args:
            step: Updates done, from 0. With a warm-up the first update has the rate 0, as in the
                schedules of transformers, so that loss curves can be laid over each other.

        Returns:
            A factor in [0, 1].
        """
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        remaining = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        falling = 1.0 - progress
        if self.shape == "cosine":
            falling = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_factor + (1.0 - self.min_factor) * falling

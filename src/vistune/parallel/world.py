"""Who this process is among all, and the one sum over them that training needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """The processes of one run.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `values` over all processes; in place, on the device, no host sync."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

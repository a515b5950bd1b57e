"""Which of a run's processes this one is, as `torchrun` says it.

Only reads the environment: no process group is made here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vistune.errors import DeviceError


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Args:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number on this machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """Returns what `torchrun` (or anything that sets the same variables) says of this process.

    Args:
        environment: RANK, WORLD_SIZE and LOCAL_RANK; this process's own when left out.

    Returns:
        The launch; that of a single process where none of them is set.

    Raises:
        DeviceError: The variables are no numbers, or do not fit together.
    """
    given = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    shown = " ".join(f"{name}={given[name]}" for name in names if name in given)
    try:
        rank, size, local_rank = (
            int(given.get(name, default)) for name, default in zip(names, "010", strict=True)
        )
    except ValueError as error:
        raise _unusable(shown) from error
    if not 0 <= rank < size or local_rank < 0:
        raise _unusable(shown)
    return Launch(rank, size, local_rank)


def _unusable(shown: str) -> DeviceError:
    return DeviceError(
        "the environment does not say which process this is",
        where="RANK, WORLD_SIZE, LOCAL_RANK",
        got=shown,
        expected="numbers with 0 <= RANK < WORLD_SIZE, as torchrun sets them, or none of them",
        fix="unset these variables",
    )

"""Which samples make which row of which optimizer step: a pure function of lengths and seed.

Nothing here reads a file or keeps state, so a run resumes from a step number alone, and every rank
computes its own share without talking to the others. With `batch.samples`, what a step holds does
not depend on how many ranks there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, overload

import numpy as np
import numpy.typing as npt

from vistune.data.mix import Share, epoch_indices
from vistune.data.pack import Bounds, pack
from vistune.errors import DataError
from vistune.recipe import BatchConfig

_WINDOW_ROWS = 64
"""Rows packed together from one stretch of the order: enough to fill them, few enough that the
order stays about as drawn."""
_ATTENTION_TOKENS = 49_152
"""Length at which attention costs as much as all the rest: 12 times the width of a 7B model."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step of one rank.

    Args:
        rows: Dataset indices of every row. A row may be empty where a step has fewer rows than
            ranks: it still stands for a forward pass, so that ranks stay in step.
    """

    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class EpochPlan(Sequence[StepPlan]):
    """The steps of one epoch for one rank, in 4 bytes a sample.

    Args:
        samples: int32; dataset indices, row after row.
        row_ends: int32 [rows]; one past the last sample of every row.
        step_ends: int32 [steps]; one past the last row of every step.
    """

    samples: npt.NDArray[np.int32]
    row_ends: npt.NDArray[np.int32]
    step_ends: npt.NDArray[np.int32]

    @classmethod
    def of(cls, steps: Sequence[Sequence[tuple[int, ...]]]) -> Self:
        """Returns the plan of steps given as rows of indices."""
        rows = [row for step in steps for row in step]
        return cls(
            np.fromiter((index for row in rows for index in row), dtype=np.int32),
            np.cumsum([len(row) for row in rows], dtype=np.int32),
            np.cumsum([len(step) for step in steps], dtype=np.int32),
        )

    def __len__(self) -> int:
        return int(self.step_ends.size)

    @overload
    def __getitem__(self, at: int) -> StepPlan: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[StepPlan]: ...
    def __getitem__(self, at: int | slice) -> StepPlan | Sequence[StepPlan]:
        if isinstance(at, slice):
            return [self[k] for k in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        first = int(self.step_ends[at - 1]) if at else 0
        ends = self.row_ends[max(first - 1, 0) : int(self.step_ends[at])].tolist()
        edges = ends if first else [0, *ends]
        held = self.samples[edges[0] : edges[-1]].tolist()
        return StepPlan(
            tuple(tuple(held[a - edges[0] : b - edges[0]]) for a, b in itertools.pairwise(edges))
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EpochPlan):
            return NotImplemented
        mine = (self.samples, self.row_ends, self.step_ends)
        return all(map(np.array_equal, mine, (other.samples, other.row_ends, other.step_ends)))

    def __hash__(self) -> int:
        return hash((len(self), self.samples.tobytes()))

    def from_step(self, step: int) -> Iterator[StepPlan]:
        """Yields the steps from one on."""
        return (self[k] for k in range(step, len(self)))

    @property
    def max_rows(self) -> int:
        """Most rows of a step."""
        return int(np.diff(self.step_ends, prepend=0).max(initial=0))

    @property
    def max_samples(self) -> int:
        """Most samples of a step."""
        ends = np.concatenate([[0], self.row_ends])[self.step_ends]
        return int(np.diff(ends, prepend=0).max(initial=0))

    def save(self, file: IO[bytes]) -> None:
        """Writes the plan into an open file, for `load`."""
        np.savez(file, samples=self.samples, row_ends=self.row_ends, step_ends=self.step_ends)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a plan.

        Raises:
            OSError: It is not there.
            ValueError: It is damaged.
        """
        with path.open("rb") as file:
            content = np.load(file)
            return cls(content["samples"], content["row_ends"], content["step_ends"])


def plan_epoch(
    lengths: npt.NDArray[np.int32],
    batch: BatchConfig,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    world_size: int = 1,
    rank: int = 0,
    indices: npt.NDArray[np.int64] | None = None,
    image_tokens: npt.NDArray[np.int32] | None = None,
) -> EpochPlan:
    """Returns the steps of one epoch for one rank.

    With `batch.samples` = n, step k holds the samples k*n to k*n+n-1 of the order, in as few rows
    as they fit into. With `batch.tokens`, rows are filled first and a step takes as many as come
    nearest to that many tokens. In both, all ranks get equally many rows, and rows of about the
    same work: tokens, and pairs of tokens that attend to each other.

    Args:
        lengths: int32 [samples]; tokens of every usable sample of the dataset.
        batch: Row and step sizes.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Draw a new order; ignored when `indices` gives one.
        world_size: Number of ranks.
        rank: This rank.
        indices: The order of the epoch, from `epoch_indices`; all samples once when left out.
        image_tokens: int32 [samples]; image tokens among `lengths`, needed where the recipe bounds
            image or text tokens of a row.

    Raises:
        DataError: A sample is longer than a row.
    """
    if indices is None:
        shares = [Share(int(lengths.size))]
        indices = epoch_indices(shares, seed=seed, epoch=epoch, shuffle=shuffle)
    images = np.zeros_like(lengths) if image_tokens is None else image_tokens
    bounds = Bounds(batch.row_tokens, batch.max_image_tokens, batch.max_text_tokens)
    if indices.size:
        _check_bounds(lengths[indices], images[indices], bounds)
    order = _Order(indices.tolist(), lengths[indices].tolist(), images[indices].tolist())
    if batch.samples is not None:
        groups = _steps_of_samples(order, batch, bounds, world_size)
    else:
        groups = _steps_of_tokens(order, batch, bounds, world_size)
    work = lengths + lengths.astype(np.float64) ** 2 / _ATTENTION_TOKENS
    return EpochPlan.of([_share(rows, work, world_size, rank) for rows in groups])


def _check_bounds(
    lengths: npt.NDArray[np.int32], images: npt.NDArray[np.int32], bounds: Bounds
) -> None:
    for key, found, most in (
        ("max_tokens", lengths, bounds.max_tokens),
        ("max_image_tokens", images, bounds.max_image_tokens),
        ("max_text_tokens", lengths - images, bounds.max_text_tokens),
    ):
        if most is not None and int(found.max()) > most:
            raise DataError(
                "a sample is longer than a row",
                where=f"batch.{key}",
                got=int(found.max()),
                expected=f"at most {most}",
                fix="raise it, or take the longest rows out of the dataset",
            )


@dataclass(frozen=True)
class _Order:
    """The samples of an epoch in order: dataset indices, tokens, image tokens."""

    indices: list[int]
    sizes: list[int]
    images: list[int]

    def cut(self, first: int, stop: int) -> _Order:
        return _Order(self.indices[first:stop], self.sizes[first:stop], self.images[first:stop])

    def rows(self, batch: BatchConfig, bounds: Bounds) -> list[tuple[int, ...]]:
        """Returns rows of positions in this order."""
        positions = range(len(self.indices))
        if not batch.pack:
            return [(k,) for k in positions]
        return pack(positions, self.sizes, bounds=bounds, image_tokens=self.images)

    def named(self, rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Returns rows of dataset indices."""
        return [tuple(self.indices[k] for k in row) for row in rows]

    def held(self, row: Sequence[int]) -> int:
        """Returns the tokens of a row of positions."""
        return sum(self.sizes[k] for k in row)


def _steps_of_samples(
    order: _Order, batch: BatchConfig, bounds: Bounds, world_size: int
) -> list[list[tuple[int, ...]]]:
    assert batch.samples is not None
    steps: list[list[tuple[int, ...]]] = []
    for first in range(0, len(order.indices), batch.samples):
        part = order.cut(first, first + batch.samples)
        rows = _to_multiple(part.rows(batch, bounds), part, world_size)
        steps.append(part.named(rows))
    return steps


def _to_multiple(
    rows: list[tuple[int, ...]], order: _Order, world_size: int
) -> list[tuple[int, ...]]:
    # Every rank must run the same number of rows: split the fullest rows, then add empty ones.
    rows = list(rows)
    while len(rows) % world_size:
        at = max(
            (k for k in range(len(rows)) if len(rows[k]) > 1),
            key=lambda k: (order.held(rows[k]), -k),
            default=None,
        )
        if at is None:
            rows.append(())
            continue
        half = _half(rows[at], order)
        rows[at : at + 1] = [rows[at][:half], rows[at][half:]]
    return rows


def _half(row: tuple[int, ...], order: _Order) -> int:
    ends = np.cumsum([order.sizes[k] for k in row])
    at = int(np.searchsorted(ends, ends[-1] / 2))
    return min(max(at, 1), len(row) - 1)


def _steps_of_tokens(
    order: _Order, batch: BatchConfig, bounds: Bounds, world_size: int
) -> list[list[tuple[int, ...]]]:
    assert batch.tokens is not None
    rows = _to_multiple(_window_rows(order, batch, bounds), order, world_size)
    steps: list[list[tuple[int, ...]]] = []
    step: list[tuple[int, ...]] = []
    held = 0
    for first in range(0, len(rows), world_size):
        group = rows[first : first + world_size]
        more = sum(order.held(row) for row in group)
        if step and held + more / 2 > batch.tokens:  # without it the step is nearer to its size
            steps.append(order.named(step))
            step, held = [], 0
        step.extend(group)
        held += more
    if step:
        steps.append(order.named(step))
    return steps


def _window_rows(order: _Order, batch: BatchConfig, bounds: Bounds) -> list[tuple[int, ...]]:
    """Returns rows of positions, filled from one stretch of the order after another."""
    if not batch.pack:
        return order.rows(batch, bounds)
    rows: list[tuple[int, ...]] = []
    window_tokens = _WINDOW_ROWS * bounds.max_tokens
    waiting: list[int] = []
    filled = 0

    def packed() -> list[tuple[int, ...]]:
        sizes = [order.sizes[k] for k in waiting]
        images = [order.images[k] for k in waiting]
        return pack(waiting, sizes, bounds=bounds, image_tokens=images)

    for position, size in enumerate(order.sizes):
        waiting.append(position)
        filled += size
        if filled >= window_tokens:
            found = packed()
            # The row with most room left goes into the next stretch.
            waiting = list(found.pop(_emptiest(found, order)))
            rows.extend(found)
            filled = order.held(waiting)
    return rows + packed()


def _emptiest(rows: list[tuple[int, ...]], order: _Order) -> int:
    return min(range(len(rows)), key=lambda k: (order.held(rows[k]), k))


def _share(
    rows: Sequence[tuple[int, ...]], work: npt.NDArray[np.float64], world_size: int, rank: int
) -> Sequence[tuple[int, ...]]:
    if world_size == 1:
        return rows
    # Most work first, each to the rank with the least so far that may still take a row.
    load = [float(work[list(row)].sum()) if row else 0.0 for row in rows]
    left = [len(rows) // world_size] * world_size
    carried = [0.0] * world_size
    mine = []
    for k in sorted(range(len(rows)), key=lambda k: (-load[k], k)):
        to = min((r for r in range(world_size) if left[r]), key=lambda r: (carried[r], r))
        left[to] -= 1
        carried[to] += load[k]
        if to == rank:
            mine.append(k)
    return [rows[k] for k in sorted(mine)]


__all__ = ["EpochPlan", "Share", "StepPlan", "epoch_indices", "pack", "plan_epoch"]

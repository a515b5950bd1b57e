"""Which samples make which row of which optimizer step: a pure function of lengths and seed.

Nothing here reads a file or keeps state, so a run resumes from a step number alone, and every rank
computes its own share without talking to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vistune.errors import DataError
from vistune.recipe import BatchConfig

_WINDOW_ROWS = 64
"""Rows packed together from one stretch of the order: enough to fill them, few enough that the
order stays about as drawn."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step of one rank.

    Args:
        rows: Dataset indices of every row. A row may be empty where a step has fewer rows than
            ranks: it still stands for a forward pass, so that ranks stay in step.
    """

    rows: tuple[tuple[int, ...], ...]


def epoch_indices(
    source_sizes: Sequence[int],
    source_epochs: Sequence[float],
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
) -> npt.NDArray[np.int64]:
    """Returns the dataset indices of one epoch, in order.

    A source seen 2 times is repeated whole; one seen 0.5 times gives half of itself, the other half
    in the next epoch, and so on round.

    Args:
        source_sizes: Usable samples of every source; the dataset is the sources end to end.
        source_epochs: How often every source is seen in one epoch of the run.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Mix all sources; otherwise they stand one after the other, in file order.

    Returns:
        int64 [number of samples in the epoch].
    """
    pieces: list[npt.NDArray[np.int64]] = []
    first = 0
    for number, (size, repeats) in enumerate(zip(source_sizes, source_epochs, strict=True)):
        own = np.arange(first, first + size, dtype=np.int64)
        whole, part = int(repeats), round((repeats - int(repeats)) * size)
        pieces.extend([own] * whole)
        if part:
            ring = own
            if shuffle:
                ring = np.random.default_rng([seed, 1, number]).permutation(own)
            taken = ring[(np.arange(part) + epoch * part) % size]
            pieces.append(taken if shuffle else np.sort(taken))
        first += size
    order = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    if shuffle:
        order = np.random.default_rng([seed, 0, epoch]).permutation(order)
    return order


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
) -> list[StepPlan]:
    """Returns the steps of one epoch for one rank.

    With `batch.samples` = n, step k holds the samples k*n to k*n+n-1 of the order, in as few rows
    as they fit into. With `batch.tokens`, rows are filled first and a step takes as many as come
    nearest to that many tokens. In both, all ranks get equally many rows.

    Args:
        lengths: int32 [samples]; tokens of every usable sample of the dataset.
        batch: Row and step sizes.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Draw a new order; ignored when `indices` gives one.
        world_size: Number of ranks.
        rank: This rank.
        indices: The order of the epoch, from `epoch_indices`; all samples once when left out.

    Raises:
        DataError: A sample is longer than a row.
    """
    if indices is None:
        indices = epoch_indices([lengths.size], [1.0], seed=seed, epoch=epoch, shuffle=shuffle)
    if indices.size and int(lengths[indices].max()) > batch.max_tokens:
        raise DataError(
            "a sample is longer than a row",
            where="batch.max_tokens",
            got=int(lengths[indices].max()),
            expected=f"at most {batch.max_tokens}",
        )
    order: list[int] = indices.tolist()
    sizes: list[int] = lengths[indices].tolist()
    if batch.samples is not None:
        groups = _steps_of_samples(order, sizes, batch, batch.samples, world_size)
    else:
        assert batch.tokens is not None
        groups = _steps_of_tokens(order, sizes, batch, batch.tokens, world_size)
    return [StepPlan(rows=_share(rows, lengths, world_size, rank)) for rows in groups]


def pack(order: Sequence[int], sizes: Sequence[int], *, max_tokens: int) -> list[tuple[int, ...]]:
    """Packs samples into about as few rows as there can be.

    Every row starts with the longest sample left and takes those of the others that fill it best
    (an exact subset sum, long samples preferred), so that what is hard to place goes first.

    Args:
        order: Dataset indices.
        sizes: Their lengths, none above `max_tokens`.
        max_tokens: Tokens a row holds.

    Returns:
        The rows; samples in a row, and rows by their first sample, in the order given.
    """
    rest = sorted(range(len(order)), key=lambda k: (-sizes[k], k))
    rows: list[list[int]] = []
    while rest:
        taken = _fill([sizes[k] for k in rest], max_tokens)
        rows.append(sorted(rest[i] for i in taken))
        for i in reversed(taken):
            del rest[i]
    rows.sort()
    return [tuple(order[k] for k in members) for members in rows]


def _fill(sizes: Sequence[int], room: int) -> list[int]:
    """Returns the positions of the first size and of those others that best fill the rest."""
    room -= sizes[0]
    whole = (1 << (room + 1)) - 1
    reached = 1  # bit n: some of the sizes seen so far add up to n
    stages: list[tuple[int, int]] = []
    for i in range(1, len(sizes)):
        if sizes[i] > room:
            continue
        stages.append((i, reached))
        reached |= (reached << sizes[i]) & whole
        if reached >> room:
            break
    total = reached.bit_length() - 1
    taken: list[int] = []
    for i, before in reversed(stages):
        if not before >> total & 1:
            taken.append(i)
            total -= sizes[i]
    return [0, *reversed(taken)]


def _steps_of_samples(
    order: list[int], sizes: list[int], batch: BatchConfig, samples: int, world_size: int
) -> list[list[tuple[int, ...]]]:
    length = dict(zip(order, sizes, strict=True))
    steps: list[list[tuple[int, ...]]] = []
    for first in range(0, len(order), samples):
        chunk, chunk_sizes = order[first : first + samples], sizes[first : first + samples]
        rows = _rows(chunk, chunk_sizes, batch)
        steps.append(_to_multiple(rows, length, world_size))
    return steps


def _rows(order: list[int], sizes: list[int], batch: BatchConfig) -> list[tuple[int, ...]]:
    if not batch.pack:
        return [(index,) for index in order]
    return pack(order, sizes, max_tokens=batch.max_tokens)


def _to_multiple(
    rows: list[tuple[int, ...]], length: dict[int, int], world_size: int
) -> list[tuple[int, ...]]:
    # Every rank must run the same number of rows: split the fullest rows, then add empty ones.
    rows = list(rows)
    while len(rows) % world_size:
        at = max(
            (k for k in range(len(rows)) if len(rows[k]) > 1),
            key=lambda k: (sum(length[i] for i in rows[k]), -k),
            default=None,
        )
        if at is None:
            rows.append(())
            continue
        half = _half(rows[at], length)
        rows[at : at + 1] = [rows[at][:half], rows[at][half:]]
    return rows


def _half(row: tuple[int, ...], length: dict[int, int]) -> int:
    ends = np.cumsum([length[i] for i in row])
    at = int(np.searchsorted(ends, ends[-1] / 2))
    return min(max(at, 1), len(row) - 1)


def _steps_of_tokens(
    order: list[int], sizes: list[int], batch: BatchConfig, tokens: int, world_size: int
) -> list[list[tuple[int, ...]]]:
    length = dict(zip(order, sizes, strict=True))
    rows: list[tuple[int, ...]] = []
    if batch.pack:
        window_tokens = _WINDOW_ROWS * batch.max_tokens
        waiting: list[int] = []
        filled = 0
        for index in order:
            waiting.append(index)
            filled += length[index]
            if filled >= window_tokens:
                packed = _rows(waiting, [length[i] for i in waiting], batch)
                # The row with most room left goes into the next stretch.
                waiting = list(packed.pop(_emptiest(packed, length)))
                rows.extend(packed)
                filled = sum(length[i] for i in waiting)
        rows.extend(_rows(waiting, [length[i] for i in waiting], batch))
    else:
        rows = _rows(order, sizes, batch)
    rows = _to_multiple(rows, length, world_size)
    steps: list[list[tuple[int, ...]]] = []
    step: list[tuple[int, ...]] = []
    held = 0
    for first in range(0, len(rows), world_size):
        group = rows[first : first + world_size]
        more = sum(length[i] for row in group for i in row)
        if step and held + more / 2 > tokens:  # without it the step is nearer to its size
            steps.append(step)
            step, held = [], 0
        step.extend(group)
        held += more
    if step:
        steps.append(step)
    return steps


def _emptiest(rows: list[tuple[int, ...]], length: dict[int, int]) -> int:
    return min(range(len(rows)), key=lambda k: (sum(length[i] for i in rows[k]), k))


def _share(
    rows: list[tuple[int, ...]], lengths: npt.NDArray[np.int32], world_size: int, rank: int
) -> tuple[tuple[int, ...], ...]:
    if world_size == 1:
        return tuple(rows)
    # Longest first, dealt out and back (0..W-1, W-1..0), so that ranks carry about equal loads.
    load = [int(lengths[list(row)].sum()) if row else 0 for row in rows]
    ranking = sorted(range(len(rows)), key=lambda k: (-load[k], k))
    mine = []
    for round_ in range(len(rows) // world_size):
        lane = rank if round_ % 2 == 0 else world_size - 1 - rank
        mine.append(ranking[round_ * world_size + lane])
    return tuple(rows[k] for k in sorted(mine))

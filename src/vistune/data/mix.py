"""Which samples an epoch holds, and in which order: sources, shares, repeats and caps.

A pure function of sizes, settings and seed. Where samples are shuffled, every source is spread
evenly over the epoch: each of its samples stands in its own equal stretch of the epoch, so any
window holds each source in its share, give or take one or two samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from vistune.recipe import SourceConfig

GroupBy = Literal["none", "length", "modality"]
_STEPS_IN_A_SORT = 50
"""Steps whose samples are sorted together: enough to make steps even, few enough to keep epochs
mixed."""


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a source an epoch holds.

    Args:
        size: Its usable samples.
        epochs: How often the source is seen in one epoch of the run; ignored where `weight` is set.
        weight: Its share of the epoch, relative to the others'.
        max_samples: Most samples of one epoch.
    """

    size: int
    epochs: float = 1.0
    weight: float | None = None
    max_samples: int | None = None

    @classmethod
    def of(cls, source: SourceConfig, size: int) -> Self:
        """Returns the share that a recipe gives a source of `size` usable samples."""
        return cls(size, source.epochs, source.weight, source.max_samples)


def epoch_sizes(shares: Sequence[Share]) -> list[int]:
    """Returns how many samples of every source one epoch holds.

    With weights, all sources together fill an epoch as long as all of them once, by the method of
    largest remainders; a source without usable samples takes no part.
    """
    if any(share.weight is not None for share in shares):
        weights = np.array([share.weight or 0.0 for share in shares])
        weights[[share.size == 0 for share in shares]] = 0
        total = sum(share.size for share in shares)
        exact = weights / max(weights.sum(), 1e-300) * total
        counts = np.floor(exact).astype(int)
        behind = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
        counts[behind] += 1
        numbers: list[int] = counts.tolist()
    else:
        numbers = [_repeated(share) for share in shares]
    return [
        number if share.max_samples is None else min(number, share.max_samples)
        for number, share in zip(numbers, shares, strict=True)
    ]


def _repeated(share: Share) -> int:
    whole = int(share.epochs)
    return whole * share.size + round((share.epochs - whole) * share.size)


def epoch_indices(
    shares: Sequence[Share], *, seed: int, epoch: int, shuffle: bool
) -> npt.NDArray[np.int64]:
    """Returns the dataset indices of one epoch, in order.

    A source seen 2 times is repeated whole. Of a source that is not seen whole (0.5 times, a
    weight, a cap) every epoch takes the next part, and so on round.

    Args:
        shares: How much of every source; the dataset is the sources end to end.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Mix all sources; otherwise they stand one after the other, in file order.

    Returns:
        int64 [number of samples in the epoch].
    """
    pieces: list[npt.NDArray[np.int64]] = []
    first = 0
    for number, (share, count) in enumerate(zip(shares, epoch_sizes(shares), strict=True)):
        own = np.arange(first, first + share.size, dtype=np.int64)
        whole, part = divmod(count, share.size) if share.size else (0, 0)
        taken = [own] * whole
        if part:
            ring = own
            if shuffle:
                ring = np.random.default_rng([seed, 1, number]).permutation(own)
            partial = ring[(np.arange(part) + epoch * part) % share.size]
            taken.append(partial if shuffle else np.sort(partial))
        pieces.append(np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64))
        first += share.size
    if not shuffle:
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    rng = np.random.default_rng([seed, 0, epoch])
    return spread([rng.permutation(piece) for piece in pieces], rng)


def spread(
    sources: Sequence[npt.NDArray[np.int64]], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Merges sources so that each is spread evenly; the order within each is kept.

    Sample k of n stands somewhere in [k / n, (k + 1) / n) of the way, at the same place in every
    such stretch.

    Args:
        sources: int64 each.
        rng: Draws where in their stretches the samples of a source stand.
    """
    if len(sources) == 1:
        return sources[0]
    places = [(np.arange(s.size) + rng.random()) / max(s.size, 1) for s in sources]
    if not places:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(sources)[np.argsort(np.concatenate(places), kind="stable")]


def grouped(
    indices: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    has_images: npt.NDArray[np.bool_],
    *,
    by: GroupBy,
    step_samples: int,
    seed: int,
    epoch: int,
) -> npt.NDArray[np.int64]:
    """Returns an epoch's order with alike samples side by side, a step's worth at a time.

    Args:
        indices: int64; the order of the epoch.
        lengths: int32 [samples of the dataset]; their tokens.
        has_images: bool [samples of the dataset].
        by: `none` changes nothing. `length` sorts stretches of 50 steps by length. `modality` keeps
            samples with and without images in different steps, and sorts each kind by length. In
            both, steps are shuffled.
        step_samples: Samples of one step, about.
        seed: Seed of the run.
        epoch: Number of the epoch.
    """
    if by == "none" or not indices.size:
        return indices
    rng = np.random.default_rng([seed, 2, epoch])
    kinds = [indices]
    if by == "modality":
        mask = has_images[indices]
        kinds = [indices[mask], indices[~mask]]
    steps: list[npt.NDArray[np.int64]] = []
    rest: list[npt.NDArray[np.int64]] = []
    for kind in kinds:
        for first in range(0, kind.size, _STEPS_IN_A_SORT * step_samples):
            stretch = kind[first : first + _STEPS_IN_A_SORT * step_samples]
            stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
            whole = stretch.size // step_samples * step_samples
            steps += np.split(stretch[:whole], whole // step_samples) if whole else []
            rest.append(stretch[whole:])
    # What fills no step of its own stands at the end, where it cannot shift the others.
    return np.concatenate([*(steps[k] for k in rng.permutation(len(steps))), *rest])

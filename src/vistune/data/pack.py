"""Filling rows: which samples share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one row may hold.

    Args:
        max_tokens: Tokens.
        max_image_tokens: Image tokens, or None.
        max_text_tokens: Text tokens, or None.
    """

    max_tokens: int
    max_image_tokens: int | None = None
    max_text_tokens: int | None = None

    @property
    def has_more(self) -> bool:
        """Whether tokens are not the only bound."""
        return self.max_image_tokens is not None or self.max_text_tokens is not None


def pack(
    order: Sequence[int],
    sizes: Sequence[int],
    *,
    bounds: Bounds,
    image_tokens: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    """Packs samples into about as few rows as there can be.

    Every row starts with the longest sample left and takes those of the others that fill it best
    (an exact subset sum, long samples preferred), so that what is hard to place goes first. Where
    image or text tokens are bounded too, a row takes the longest samples that still fit.

    Args:
        order: Dataset indices.
        sizes: Their lengths, none above the bounds.
        bounds: What a row may hold.
        image_tokens: Image tokens among the lengths; needed where they or text are bounded.

    Returns:
        The rows; samples in a row, and rows by their first sample, in the order given.
    """
    rest = sorted(range(len(order)), key=lambda k: (-sizes[k], k))
    rows: list[list[int]] = []
    while rest:
        if bounds.has_more:
            assert image_tokens is not None
            taken = _fill_bounded(rest, sizes, image_tokens, bounds)
        else:
            taken = _fill([sizes[k] for k in rest], bounds.max_tokens)
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


def _fill_bounded(
    rest: Sequence[int], sizes: Sequence[int], image_tokens: Sequence[int], bounds: Bounds
) -> list[int]:
    room = bounds.max_tokens
    images = room if bounds.max_image_tokens is None else bounds.max_image_tokens
    texts = room if bounds.max_text_tokens is None else bounds.max_text_tokens
    taken: list[int] = []
    for i, k in enumerate(rest):
        image = image_tokens[k]
        text = sizes[k] - image
        if not taken or (sizes[k] <= room and image <= images and text <= texts):
            taken.append(i)
            room, images, texts = room - sizes[k], images - image, texts - text
    return taken

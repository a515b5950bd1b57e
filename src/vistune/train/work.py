"""What the rows of a step cost in operations, read off the rows themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from vistune.models.flops import ModelWork, RowLengths, row_flops
from vistune.types import Batch


def lengths_of(row: Batch, *, reads_tail: bool) -> RowLengths:
    """Returns what of a row decides its cost.

    Args:
        row: On the CPU.
        reads_tail: The model computes its last layer from the first target of a sample on.
    """
    edges = row.cu_seqlens.tolist()
    samples = [end - start for start, end in itertools.pairwise(edges)]
    tails = None
    if reads_tail and row.num_targets:
        first = np.array(edges[1:])
        np.minimum.at(first, row.target_sample_M.numpy(), row.target_index_M.numpy())
        tails = [int(n) for n in np.array(edges[1:]) - first]
    pixels = row.pixel_values_NCYX
    return RowLengths(
        samples=samples,
        tails=tails,
        num_targets=row.num_targets,
        num_images=0 if pixels is None else pixels.shape[0],
        num_image_tokens=row.num_image_tokens,
        pixel_shape=() if pixels is None else tuple(pixels.shape),
        image_shapes=row.image_shapes,
    )


def row_cost(work: ModelWork | None, *, reads_tail: bool) -> Callable[[Batch], int] | None:
    """Returns what counts the operations of a row; None where the model's cost is not known."""
    if work is None:
        return None

    def cost(row: Batch) -> int:
        return row_flops(work, lengths_of(row, reads_tail=reads_tail)).total

    return cost

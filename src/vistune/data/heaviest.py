"""Which rows of a run's first epoch need most memory, by their lengths alone.

Training rehearses the steps they are in before its first; a plan predicts them. No row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vistune.data.order import StepPlan


@dataclass(frozen=True, slots=True)
class HeavyRow:
    """A row that may need more memory than any other.

    Args:
        what: What is most in it.
        step: Its step of the epoch, from 0.
        num_before: Rows of its step that lie before it.
        samples: Dataset indices.
    """

    what: str
    step: int
    num_before: int
    samples: tuple[int, ...]


def heaviest_rows(
    plans: Sequence[StepPlan],
    lengths: npt.NDArray[np.int32],
    image_tokens: npt.NDArray[np.int32],
) -> tuple[HeavyRow, ...]:
    """Returns up to three rows: behind another of its step, by image tokens, and by length.

    The longest row fills the decoder, the row with most image tokens the tower: where rows are
    packed full they need not be the same. A row behind another of its step needs room beside
    gradients that exist by then: it may be shorter and need more.

    Args:
        plans: The steps of the epoch.
        lengths: [samples]; tokens of every sample.
        image_tokens: [samples]; image tokens among them.
    """
    tokens, seen = lengths.tolist(), image_tokens.tolist()
    found = []
    for counts, first, what in (
        (tokens, 1, "the longest row behind another"),
        (seen, 0, "the row with most image tokens"),
        (tokens, 0, "the longest row"),
    ):
        heaviest, most = None, 0
        for step, plan in enumerate(plans):
            for before, samples in enumerate(plan.rows[first:], first):
                count = sum(counts[i] for i in samples)
                if count > most:
                    heaviest, most = HeavyRow(what, step, before, samples), count
        if heaviest is not None:
            found.append(heaviest)
    return tuple(found)

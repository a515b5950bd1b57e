"""Which rows may need most memory, by the lengths of their samples."""

from __future__ import annotations

import numpy as np
import pytest

from vistune.data.heaviest import HeavyRow, heaviest_rows
from vistune.data.order import StepPlan

BEHIND, IMAGES, LONGEST = (
    "the longest row behind another",
    "the row with most image tokens",
    "the longest row",
)
PLANS = [StepPlan(((0, 1), (3,))), StepPlan(((2,),))]


@pytest.mark.parametrize(
    ("lengths", "image_tokens", "expected"),
    [
        # 20 tokens beside gradients may need more than 90 without.
        ([10, 30, 90, 20], [0, 0, 0, 0], [(BEHIND, 0, 1, (3,)), (LONGEST, 1, 0, (2,))]),
        (
            [10, 30, 90, 20],
            [8, 24, 0, 8],
            [(BEHIND, 0, 1, (3,)), (IMAGES, 0, 0, (0, 1)), (LONGEST, 1, 0, (2,))],
        ),
        (
            [10, 30, 20, 50],
            [8, 24, 0, 40],
            [(BEHIND, 0, 1, (3,)), (IMAGES, 0, 1, (3,)), (LONGEST, 0, 1, (3,))],
        ),
        # Of equals the first; a row that is there only to keep ranks in step is not one.
        ([10, 30, 40, 0], [0, 0, 0, 0], [(LONGEST, 0, 0, (0, 1))]),
    ],
)
def test_they_are_by_length_by_image_tokens_and_by_place(lengths, image_tokens, expected):
    found = heaviest_rows(PLANS, np.array(lengths, np.int32), np.array(image_tokens, np.int32))
    assert found == tuple(HeavyRow(*row) for row in expected)


def test_no_step_has_none():
    assert heaviest_rows([], np.array([], np.int32), np.array([], np.int32)) == ()

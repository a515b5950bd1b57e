"""Mistral 3's rows of tokens at the sizes it is published with, against the public processor."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from vistune.data.layout import RowBreakLayout
from vistune.errors import DataError, ImageError


def layout_of(**values: Any) -> RowBreakLayout:
    return RowBreakLayout(
        image_token_id=7,
        processor={"image_processor_type": "PixtralImageProcessor"},
        patch_px=14,
        merge=2,
        break_id=8,
        end_id=9,
        **{"longest_px": 1540, **values},
    )


@pytest.mark.parametrize("longest", [1540, 1024, 300])
def test_sizes_are_the_public_processors(longest: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import (
        get_resize_output_image_size,
    )

    layout = layout_of(longest_px=longest)
    draw = random.Random(longest)
    for _ in range(600):
        most = draw.choice((60, 1600, 5000))
        height, width = draw.randint(29, 29 + most), draw.randint(29, 29 + most)
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = get_resize_output_image_size(blank, size=longest, patch_size=28)
        assert tuple(side * 14 for side in layout.shape(height, width)) == tuple(expected)


def test_rows_end_with_breaks_and_the_last_with_its_own_mark() -> None:
    assert layout_of().block(56, 84).tolist() == [7, 7, 7, 8, 7, 7, 7, 9]


def test_a_bound_takes_the_largest_size_that_fits() -> None:
    free = layout_of()
    for bound in (6, 30, 500):
        limited = free.limited(bound)
        count = limited.num_tokens(1500, 1500)
        assert 0.6 * bound < count <= bound
    assert free.limited(5000).num_tokens(300, 400) == free.num_tokens(300, 400)
    with pytest.raises(DataError, match="at least 6"):
        free.limited(5)


@pytest.mark.parametrize(("size", "why"), [((20, 20), "single token"), ((1, 5000), "vanish")])
def test_what_the_model_cannot_take_is_refused(size: tuple[int, int], why: str) -> None:
    with pytest.raises(ImageError, match=why):
        layout_of().block(*size)

"""LLaVA-OneVision's token counts at the sizes it is published with, against transformers' model."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from vistune.data.layout import OneVisionLayout
from vistune.errors import DataError

SIZES = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def layout_of(**values: Any) -> OneVisionLayout:
    return OneVisionLayout(
        image_token_id=7,
        processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [list(size) for size in SIZES],
        },
        tile_px=384,
        tokens_per_side=27,
        sizes_px=SIZES,
        max_tiles=9,
        **values,
    )


def drawn_sizes(number: int) -> list[tuple[int, int]]:
    draw = random.Random(4)
    most = [draw.choice((20, 400, 1200, 6000)) for _ in range(2 * number)]
    sides = [draw.randint(1, side) for side in most]
    return list(zip(sides[::2], sides[1::2], strict=True))


def test_counts_are_the_models() -> None:
    layout = layout_of()
    for size in drawn_sizes(1500):
        best = select_best_resolution(size, [list(s) for s in SIZES])
        assert layout.best_size(*size) == tuple(best)
        features = torch.empty(1, 27 * best[0] // 384, 27 * best[1] // 384, device="meta")
        _, rows, columns = unpad_image(features, size).shape
        ratio = math.sqrt(rows * columns / (9 * 27**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        assert layout.num_tokens(*size) == 729 + rows * (columns + 1), size


def test_several_images_are_shown_whole() -> None:
    layout = layout_of()
    assert layout.among(1) is layout
    several = layout.among(3)
    assert several.num_tokens(3000, 4000) == 730
    assert several.num_inputs(3000, 4000) == 1
    assert several.shape(30, 40) == (30, 40, 0)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (30, 60, 3), dtype=np.uint8))
    out = layout.image_processor(images=[[image, image]], return_tensors="np")
    assert np.array_equal(several.pixels(image), out["pixel_values"][1])


def test_a_bound_makes_images_smaller_and_then_whole() -> None:
    for bound in (1485, 2000, 4000):
        limited = layout_of().limited(bound)
        counts = [limited.num_tokens(*size) for size in drawn_sizes(150)]
        assert 0.9 * bound < max(counts) <= bound
    assert layout_of().limited(1484).num_tokens(2000, 2000) == 730
    with pytest.raises(DataError, match="730"):
        layout_of().limited(729)

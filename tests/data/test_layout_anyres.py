"""Token counts and pixels of images in tiles, against the public numbers and transformers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from vistune.data.image import ImagePlan
from vistune.data.layout import AnyresLayout, load_layout

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def layout_of(tile_px: int, tile_tokens: int) -> AnyresLayout:
    plan = ImagePlan(
        mode="resize",
        size_px=tile_px,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    return AnyresLayout(image_token_id=7, plan=plan, tile_tokens=tile_tokens, grids=GRIDS)


LLAVA = layout_of(336, 24)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(640, 480, 2340), (336, 336, 1176), (1000, 300, 2182), (300, 1000, 2232)],
)
def test_public_token_counts(width: int, height: int, tokens: int) -> None:
    assert LLAVA.num_tokens(height, width) == tokens
    assert (LLAVA.block(height, width) == 7).sum() == tokens


def test_counts_are_those_of_the_processor() -> None:
    processor: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil()
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    drawn = np.random.RandomState(0).randint(1, 2000, (400, 2)).tolist()
    for height, width in [*drawn, [1, 1], [1, 2000], [2000, 1]]:
        expected = processor._get_number_of_features(height, width, 336, 336)
        assert LLAVA.num_tokens(height, width) == expected, (height, width)


def test_pixels_are_the_processors() -> None:
    layout = layout_of(28, 2)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28 * rows, 28 * columns] for rows, columns in GRIDS],
    )
    random = np.random.RandomState(1)
    for height, width in [*random.randint(1, 150, (25, 2)).tolist(), [28, 28], [56, 56], [2, 140]]:
        image = Image.fromarray(random.randint(0, 255, (height, width, 3), dtype=np.uint8))
        expected = processor(images=[image], return_tensors="np")["pixel_values"][0]
        found = layout.pixels(image)
        assert found.shape[0] == layout.num_inputs(height, width)
        np.testing.assert_array_equal(found, expected)
        assert [view.size for view in layout.pictures(image)] == [(28, 28)] * len(found)


def test_a_layout_survives_the_checkpoint() -> None:
    assert load_layout(LLAVA.model_dump(mode="json")) == LLAVA

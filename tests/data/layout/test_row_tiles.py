"""Idefics3's and SmolVLM's rows of tiles, against the public processor's own steps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from transformers.image_utils import PILImageResampling, SizeDict

from vistune.data.layout import RowTileLayout
from vistune.errors import DataError, ImageError

MODELS = {
    "idefics3": ("Idefics3ImageProcessor", 1456, 364),
    "smolvlm": ("SmolVLMImageProcessor", 2048, 512),
    "smolvlm2": ("SmolVLMImageProcessorFast", 1536, 384),
    "no multiple": ("SmolVLMImageProcessor", 700, 160),
    "one tile": ("SmolVLMImageProcessor", 512, 512),
}


def layout_of(name: str, **values: Any) -> RowTileLayout:
    kind, longest, tile = MODELS[name]
    return RowTileLayout(
        image_token_id=7,
        processor={
            "image_processor_type": kind,
            "size": {"longest_edge": longest},
            "max_image_size": {"longest_edge": tile},
        },
        tile_px=tile,
        longest_px=longest,
        split=True,
        tokens_per_tile=64,
        mark_id=1,
        whole_id=2,
        place_ids=tuple(tuple(range(100 * row, 100 * row + 6)) for row in range(1, 7)),
        row_end_ids=(3,),
        last_row_end_ids=(4,),
        **values,
    )


def public_grid(layout: RowTileLayout, height: int, width: int) -> tuple[int, int]:
    """What the public processor makes of an image; pixels do not matter here."""
    processor, nearest = layout.image_processor, PILImageResampling.NEAREST
    image = np.zeros((3, height, width), dtype=np.uint8)
    image = processor.resize(image, SizeDict(longest_edge=layout.longest_px), resample=nearest)
    image = processor.resize_for_vision_encoder(image, layout.tile_px, resample=nearest)
    size = {"longest_edge": layout.tile_px}
    _, rows, columns = processor.split_images(image, size, resample=nearest)
    return rows, columns


@pytest.mark.parametrize("name", sorted(MODELS))
def test_grids_are_the_public_processors(name: str) -> None:
    layout = layout_of(name)
    draw = random.Random(2)
    sizes = [(1, 2000), (2000, 1), (3, 5000), (300, 301), (layout.longest_px, layout.tile_px + 1)]
    sizes += [(draw.randint(1, 900), draw.randint(1, 900)) for _ in range(15)]
    for size in sizes:
        assert layout.shape(*size) == public_grid(layout, *size), size


def test_the_block_is_written_row_by_row() -> None:
    layout = layout_of("idefics3")
    rows, columns = layout.shape(700, 1456)
    assert (rows, columns) == (2, 4)
    ids = layout.block(700, 1456)
    text = [int(i) for i in ids if i != 7]
    first = [1, 100, 1, 101, 1, 102, 1, 103, 3]
    second = [1, 200, 1, 201, 1, 202, 1, 203, 4]
    assert text == [*first, *second, 1, 2, 1]
    assert (ids == 7).sum() == 64 * 9
    single = layout_of("one tile").block(30, 30)
    assert [int(i) for i in single if i != 7] == [1, 2, 1]


def test_a_bound_takes_the_finest_grid_that_fits() -> None:
    layout = layout_of("smolvlm").limited(500)
    assert layout.shape(1000, 1000) == (2, 2)
    assert layout.shape(200, 2000) == (1, 4)
    assert layout.limited(67).shape(1000, 1000) == (0, 0)
    with pytest.raises(DataError, match="67"):
        layout.limited(66)


def test_more_tiles_than_the_tokenizer_names_are_refused() -> None:
    layout = layout_of("smolvlm").model_copy(update={"place_ids": ((100, 101), (200, 201))})
    with pytest.raises(ImageError, match="no names"):
        layout.block(1000, 1000)
    assert layout.limited(400).shape(1000, 1000) == (2, 2)
    assert layout.limited(400).block(1000, 1000).size <= 400

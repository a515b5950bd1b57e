"""InternVL's tiles at the sizes its models are published with, against the public processor."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vistune.data.layout import RatioTileLayout
from vistune.errors import DataError


def layout_of(**values: Any) -> RatioTileLayout:
    processor = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "size": {"height": 448, "width": 448},
        "crop_to_patches": True,
    }
    given: dict[str, Any] = {"max_tiles": 12, "before": (5,), "after": (6,), **values}
    bounds = {"min_patches": given.get("min_tiles", 1), "max_patches": given["max_tiles"]}
    return RatioTileLayout(
        image_token_id=7,
        processor={**processor, **bounds},
        tile_height_px=448,
        tile_width_px=448,
        tokens_per_tile=256,
        **given,
    )


@pytest.mark.parametrize("bounds", [(1, 12), (1, 6), (1, 1), (4, 9), (1, 40)])
def test_tiles_are_the_public_processors(bounds: tuple[int, int]) -> None:
    layout = layout_of(min_tiles=bounds[0], max_tiles=bounds[1])
    draw = random.Random(bounds[1])
    for _ in range(400):
        most = draw.choice((30, 700, 5000))
        size = draw.randint(1, most), draw.randint(1, most)
        tiles = layout.image_processor.get_number_of_image_patches(*size, {})
        assert layout.num_inputs(*size) == tiles, size
        assert layout.num_tokens(*size) == 256 * tiles + 2


def test_ties_go_to_the_larger_grid_while_the_image_fills_half_of_it() -> None:
    layout = layout_of()
    sizes = (448, 448), (900, 900), (1300, 1300)
    assert [layout.shape(*size) for size in sizes] == [(1, 1), (2, 2), (3, 3)]


def test_fewer_tokens_than_a_tile_are_refused() -> None:
    assert layout_of().limited(258).num_tokens(3000, 4000) == 258
    assert layout_of().limited(770).num_tokens(3000, 4000) <= 770
    with pytest.raises(DataError, match="258"):
        layout_of().limited(257)

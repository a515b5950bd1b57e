"""Tiles in the grid whose shape comes nearest to the image's, and a thumbnail: InternVL.

Of all grids with few enough tiles the one with the image's aspect ratio is taken, the image is
stretched to it and cut; more than one tile brings the whole image as one tile more, behind them.
Every tile becomes the same number of tokens, with nothing between them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import model_validator

from vistune.data.layout.base import ImageLayout, pictures_of
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape


class RatioTileLayout(ImageLayout):
    """The layout of towers that take square tiles, where only their number says how many tokens."""

    kind: Literal["ratio_tiles"] = "ratio_tiles"
    """Tells the forms of layout apart."""
    tile_height_px: PositiveInt
    """Height of a tile."""
    tile_width_px: PositiveInt
    """Width of a tile."""
    tokens_per_tile: PositiveInt
    """Tokens a tile becomes."""
    min_tiles: PositiveInt = 1
    """Fewest tiles of a grid."""
    max_tiles: PositiveInt
    """Most tiles of a grid; the thumbnail is not counted."""

    @model_validator(mode="after")
    def _bounds(self) -> RatioTileLayout:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} > max_tiles {self.max_tiles}")
        return self

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (rows, columns) of the grid.

        Source: `crop_to_patches` of the public GOT-OCR2 image processor, which InternVL uses.
        """
        if self.max_tiles == 1:
            return 1, 1
        best, least = (1, 1), float("inf")
        for columns, rows in self._grids():
            difference = abs(width / height - columns / rows)
            # Among grids of one shape the larger one, as long as the image fills half of it.
            fills = height * width > 0.5 * self.tile_height_px * self.tile_width_px * columns * rows
            if difference < least or (difference == least and fills):
                best, least = (rows, columns), difference
        return best

    def _grids(self) -> list[tuple[int, int]]:
        sides = range(1, self.max_tiles + 1)
        grids = [
            (columns, rows)
            for columns in sides
            for rows in sides
            if self.min_tiles <= columns * rows <= self.max_tiles
        ]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the tiles of an image, with the thumbnail."""
        rows, columns = self.shape(height, width)
        return rows * columns + (rows * columns > 1)

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image without the marks around it."""
        return self.num_inputs(height, width) * self.tokens_per_tile

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the image token as often as the image has tokens."""
        return np.full(self.num_body(height, width), self.image_token_id, dtype=np.int64)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the tiles, row by row, and the thumbnail."""
        return pictures_of(self.pixels(image), self.image_processor)

    def limited(self, max_tokens: int) -> RatioTileLayout:
        """Returns the layout with `max_tiles` lowered so that a full grid has few enough tokens.

        Raises:
            DataError: One tile is more.
        """
        fit = (max_tokens - len(self.before) - len(self.after)) // self.tokens_per_tile
        if fit < 1:
            least = self.tokens_per_tile + len(self.before) + len(self.after)
            raise DataError(
                "a tile becomes more tokens than that",
                where="data.image.max_tokens",
                got=max_tokens,
                expected=f"at least {least}",
            )
        most = min(self.max_tiles, max(1, fit - 1))  # the thumbnail takes one
        least = min(self.min_tiles, most)
        bounds = {"max_tiles": most, "min_tiles": least}
        processor = {**self.processor, "max_patches": most, "min_patches": least}
        return self.model_copy(update={**bounds, "processor": processor})

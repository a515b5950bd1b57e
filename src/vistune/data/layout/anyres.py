"""Images as a whole and in tiles (anyres): LLaVA-1.6 and models composed with `model.tiles`.

An image is shrunk or enlarged into the grid of tiles that keeps most of its pixels, in the middle
of a black canvas, and cut into tiles; the whole image, aspect not kept, is one more view. What the
canvas adds is cut from the tokens again, each row of which a newline ends.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.image import RESAMPLE, ImagePlan
from vistune.data.layout.base import ImageLayout
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape

Grid = tuple[PositiveInt, PositiveInt]


class AnyresLayout(ImageLayout):
    """The layout of models that see an image as a whole and in tiles."""

    kind: Literal["anyres"] = "anyres"
    """Tells the forms of layout apart."""
    processor: dict[str, Any] = {}
    """Unused: `plan` does what the public image processor would."""
    plan: ImagePlan
    """How a view becomes pixels; its side is a tile's."""
    tile_tokens: PositiveInt
    """Tokens in a row of a tile; a tile is square."""
    grids: tuple[Grid, ...]
    """(rows, columns) of tiles an image may be cut into."""

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the tiles of an image of `height` x `width` pixels.

        Source: `select_best_resolution` of transformers' and the original LLaVA-1.6.
        """
        best, most, least = self.grids[0], -1, 0
        for rows, columns in self.grids:
            tall, wide = rows * self.plan.size_px, columns * self.plan.size_px
            scale = min(wide / width, tall / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = tall * wide - kept
            if kept > most or (kept == most and wasted < least):
                best, most, least = (rows, columns), kept, wasted
        return best

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns rows and columns of tiles, and rows and columns of tokens cut off on each side.

        Source: `unpad_image` of transformers' LLaVA-NeXT.
        """
        rows, columns = self.grid_for(height, width)
        tall, wide = rows * self.tile_tokens, columns * self.tile_tokens
        if width / height > wide / tall:
            return rows, columns, (tall - int(round(height * (wide / width), 7))) // 2, 0
        return rows, columns, 0, (wide - int(round(width * (tall / height), 7))) // 2

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the views of an image: itself and its tiles."""
        rows, columns = self.grid_for(height, width)
        return 1 + rows * columns

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image: one view, then rows of tiles with their newlines."""
        rows, columns, cut_rows, cut_columns = self.shape(height, width)
        tall = rows * self.tile_tokens - 2 * cut_rows
        wide = columns * self.tile_tokens - 2 * cut_columns
        return self.tile_tokens**2 + tall * (wide + 1)

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the image token as often as the image has tokens."""
        return np.full(self.num_body(height, width), self.image_token_id, dtype=np.int64)

    def most_tokens(self, grid: tuple[int, int]) -> int:
        """Returns the tokens of an image that fills a grid."""
        rows, columns = (n * self.tile_tokens for n in grid)
        return self.tile_tokens**2 + rows * (columns + 1)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the views of an image: float32 [1 + tiles, 3, Y, X], tiles row by row.

        Source: transformers' LLaVA-NeXT image processor on Pillow, to the bit.
        """
        return np.stack([self.plan.apply(view) for view in self._views(image)])

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the views of an image, before normalisation."""
        return [self.plan.to_square(view) for view in self._views(image)]

    def _views(self, image: Image.Image) -> list[Image.Image]:
        """Returns the image and its tiles; the plan brings the first to a tile's size."""
        rows, columns = self.grid_for(image.height, image.width)
        side = self.plan.size_px
        tall, wide = rows * side, columns * side
        if wide / image.width < tall / image.height:
            size = wide, min(math.ceil(image.height * (wide / image.width)), tall)
        else:
            size = min(math.ceil(image.width * (tall / image.height)), wide), tall
        canvas = Image.new("RGB", (wide, tall))
        place = (wide - size[0]) // 2, (tall - size[1]) // 2
        canvas.paste(image.resize(size, resample=RESAMPLE[self.plan.resample]), place)
        corners = [(x * side, y * side) for y in range(rows) for x in range(columns)]
        return [image, *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]

    def limited(self, max_tokens: int) -> AnyresLayout:
        """Returns the layout with the grids left whose images have at most `max_tokens` tokens.

        Raises:
            DataError: None is left.
        """
        kept = tuple(grid for grid in self.grids if self.most_tokens(grid) <= max_tokens)
        if not kept:
            raise DataError(
                "every grid of tiles makes more tokens of an image",
                where="data.image.max_tokens",
                got=max_tokens,
                expected=f"at least {min(map(self.most_tokens, self.grids))}",
                fix="raise it, or name smaller grids in model.tiles.grids",
            )
        return self.model_copy(update={"grids": kept})

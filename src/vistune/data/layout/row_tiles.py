"""Rows of tiles, each named by its place, and the whole image last: Idefics3 and SmolVLM.

An image is resized until its longer side has a given length, then stretched to whole tiles and cut.
In front of every tile stand a mark and the tile's place (`<row_1_col_2>`), behind every row a line
break; the whole image as one tile more closes the block.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.layout.base import ImageLayout, pictures_of, unusual_shape
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape

_LARGEST_PX = 4096  # whatever the files say, no image is made larger by the public processors


class RowTileLayout(ImageLayout):
    """The layout of towers that take square tiles whose places the text says."""

    kind: Literal["row_tiles"] = "row_tiles"
    """Tells the forms of layout apart."""
    tile_px: PositiveInt
    """Side of a tile."""
    longest_px: PositiveInt
    """The longer side an image is resized to before it is cut."""
    split: bool
    """Images are cut; otherwise each is one tile."""
    tokens_per_tile: PositiveInt
    """Tokens a tile becomes."""
    mark_id: int
    """The id around and between tiles (`<fake_token_around_image>`)."""
    whole_id: int
    """The id in front of the tile that shows the whole image (`<global-img>`)."""
    place_ids: tuple[tuple[int, ...], ...]
    """The ids of the tiles' places, by row and column."""
    row_end_ids: tuple[int, ...]
    """What stands behind a row of tiles (a line break)."""
    last_row_end_ids: tuple[int, ...]
    """What stands behind the last row (two line breaks, which may be one token)."""
    max_tokens: PositiveInt | None = None
    """Most tokens of an image: larger ones are resized to fewer tiles."""

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (rows, columns) of tiles; (0, 0) where the image is one tile.

        Raises:
            ImageError: So elongated that a side would vanish.
        """
        return self._grid(height, width, self._longest(height, width))

    def _longest(self, height: int, width: int) -> int:
        """Returns the longer side that an image is resized to: the largest one that fits."""
        if self.max_tokens is None or not self.split:
            return self.longest_px
        steps = range((self.longest_px - 1) // self.tile_px, 0, -1)
        for longest in (self.longest_px, *(step * self.tile_px for step in steps)):
            if self._size(*self._grid(height, width, longest)) <= self.max_tokens:
                return longest
        raise unusual_shape(
            height,
            width,
            why=f"it becomes more than {self.max_tokens:,} tokens at any size",
            fix="raise data.image.max_tokens",
        )

    def _grid(self, height: int, width: int, longest: int) -> tuple[int, int]:
        """Returns (rows, columns) for one length of the longer side.

        Source: the public Idefics3 image processor.
        """
        if not self.split:
            return 0, 0
        height, width = _shrunk(*_enlarged(height, width, longest))
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.tile_px)
            rows = math.ceil(int(columns * self.tile_px / ratio) / self.tile_px)
        else:
            rows = math.ceil(height / self.tile_px)
            columns = math.ceil(int(rows * self.tile_px * ratio) / self.tile_px)
        if not rows or not columns:
            raise unusual_shape(
                height, width, why="a side would vanish", fix="cut the image into pieces"
            )
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the tiles of an image, with the one that shows all of it."""
        rows, columns = self.shape(height, width)
        return rows * columns + 1

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image."""
        return self._size(*self.shape(height, width))

    def _size(self, rows: int, columns: int) -> int:
        tiles = (self.tokens_per_tile + 2) * (rows * columns + 1) + 1
        if not rows:
            return tiles
        return tiles + (rows - 1) * len(self.row_end_ids) + len(self.last_row_end_ids)

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the tiles row by row with their places, and the whole image."""
        rows, columns = self.shape(height, width)
        if rows > len(self.place_ids) or columns > len(self.place_ids[0] if rows else ()):
            raise unusual_shape(
                height,
                width,
                why=f"{rows} x {columns} tiles, and the tokenizer has no names for that many",
                fix="set data.image.max_tokens",
            )
        ids: list[int] = []
        for row in range(rows):
            for column in range(columns):
                ids += self._tile(self.place_ids[row][column])
            ids += self.row_end_ids if row < rows - 1 else self.last_row_end_ids
        return np.array([*ids, *self._tile(self.whole_id), self.mark_id], dtype=np.int64)

    def _tile(self, place_id: int) -> list[int]:
        return [self.mark_id, place_id, *[self.image_token_id] * self.tokens_per_tile]

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the tiles: float32 [n, 3, Y, X]."""
        size = {"longest_edge": self._longest(image.height, image.width)}
        out = self.image_processor(images=[image], size=size, return_tensors="np")
        return np.asarray(out["pixel_values"][0], dtype=np.float32)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the tiles, row by row, and the whole image."""
        return pictures_of(self.pixels(image), self.image_processor)

    def limited(self, max_tokens: int) -> RowTileLayout:
        """Returns the layout that resizes an image to fewer tiles until its tokens are few enough.

        Raises:
            DataError: One tile is more.
        """
        least = self._size(0, 0)
        if max_tokens < least:
            raise DataError(
                "an image of one tile becomes more tokens than that",
                where="data.image.max_tokens",
                got=max_tokens,
                expected=f"at least {least}",
            )
        return self.model_copy(update={"max_tokens": max_tokens})


def _enlarged(height: int, width: int, longest: int) -> tuple[int, int]:
    """Returns the size whose longer side is `longest`; the other one is made even."""
    ratio = width / height
    if width >= height:
        height, width = _even(int(longest / ratio)), longest
    else:
        height, width = longest, _even(int(longest * ratio))
    return max(height, 1), max(width, 1)


def _even(length: int) -> int:
    return length + length % 2


def _shrunk(height: int, width: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > _LARGEST_PX:
        height, width = int(_LARGEST_PX / ratio), _LARGEST_PX
    elif height > width and height > _LARGEST_PX:
        height, width = _LARGEST_PX, int(_LARGEST_PX * ratio)
    return max(height, 1), max(width, 1)

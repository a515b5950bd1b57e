"""Tiles in the best of a list of sizes, without the tokens of their padding: LLaVA-OneVision.

A single image is shown twice: whole, as one square tile, and at the size of the list that keeps
most of it, padded and cut into tiles. The model puts the tiles' features together again, drops
those of the padding, shrinks a grid that is too large, and closes every row with a token of its
own. Several images in one sample are shown whole only.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import model_validator

from vistune.data.layout.base import ImageLayout, pictures_of
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape

_STEPS_PER_HALF = 8  # sizes tried before an image is half as long and wide


class OneVisionLayout(ImageLayout):
    """The layout of LLaVA-OneVision. The model is told (height, width, is cut)."""

    kind: Literal["onevision"] = "onevision"
    """Tells the forms of layout apart."""
    tile_px: PositiveInt
    """Side of a tile."""
    tokens_per_side: PositiveInt
    """A tile becomes this many tokens squared."""
    sizes_px: tuple[tuple[PositiveInt, PositiveInt], ...]
    """The sizes (height, width) an image can be padded to, in order of preference."""
    max_tiles: PositiveInt
    """A grid of tokens is shrunk to the area of this many tiles (`anyres_max_9`)."""
    cut: bool = True
    """Images are cut into tiles; otherwise they are shown whole only."""
    max_tokens: PositiveInt | None = None
    """Most tokens of an image: larger ones are made smaller first."""

    @model_validator(mode="after")
    def _whole_tiles(self) -> OneVisionLayout:
        broken = [size for size in self.sizes_px if any(side % self.tile_px for side in size)]
        if broken or not self.sizes_px:
            raise ValueError(f"sizes {broken} are not whole tiles of {self.tile_px} pixels")
        return self

    def among(self, num_images: int) -> OneVisionLayout:
        """Returns the layout that shows images whole when there are several in a sample."""
        return self if num_images < 2 or not self.cut else self.model_copy(update={"cut": False})

    def given(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) an image is brought to before anything else."""
        if self.max_tokens is None or not self.cut:
            return height, width
        for step in range(_STEPS_PER_HALF * math.ceil(math.log2(max(height, width)) + 1)):
            scale = 2 ** (-step / _STEPS_PER_HALF)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            if self._num_cut(*size) <= self.max_tokens:
                return size
        return 1, 1

    def best_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of the list that keeps most of an image, and of those the smallest.

        Source: `select_best_resolution` of transformers, from the public LLaVA-NeXT.
        """
        best, kept, wasted = self.sizes_px[0], 0, math.inf
        for size in self.sizes_px:
            scale = min(size[1] / width, size[0] / height)
            keeps = min(int(width * scale) * int(height * scale), height * width)
            wastes = size[0] * size[1] - keeps
            if keeps > kept or (keeps == kept and wastes < wasted):
                best, kept, wasted = size, keeps, wastes
        return best

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the tokens of all tiles, without padding, shrunk to fit.

        Source: `pack_image_features` of the public LLaVA-OneVision.
        """
        side = self.tokens_per_side
        rows, columns = (side * px // self.tile_px for px in self.best_size(height, width))
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            rows -= (rows - kept) // 2 * 2
        else:
            kept = int(round(width * (rows / height), 7))
            columns -= (columns - kept) // 2 * 2
        ratio = math.sqrt(rows * columns / (self.max_tiles * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def _num_cut(self, height: int, width: int) -> int:
        rows, columns = self.token_grid(height, width)
        return self.tokens_per_side**2 + rows * (columns + 1)

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (height, width, 1 when it is cut into tiles and 0 when it is shown whole)."""
        return *self.given(height, width), int(self.cut)

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the tiles of an image, with the one that shows all of it."""
        if not self.cut:
            return 1
        rows, columns = (px // self.tile_px for px in self.best_size(*self.given(height, width)))
        return rows * columns + 1

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image."""
        if not self.cut:
            return self.tokens_per_side**2 + 1
        return self._num_cut(*self.given(height, width))

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the image token as often as the image has tokens."""
        return np.full(self.num_body(height, width), self.image_token_id, dtype=np.int64)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the whole image and its tiles, row by row: float32 [n, 3, Y, X]."""
        height, width = self.given(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
        # The processor shows images whole when a sample has several: a second one, of one pixel,
        # stands in for them.
        images = [image] if self.cut else [image, Image.new("RGB", (1, 1))]
        out = self.image_processor(images=[images], return_tensors="np")
        return np.asarray(out["pixel_values"][0], dtype=np.float32)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the whole image, and its tiles row by row."""
        return pictures_of(self.pixels(image), self.image_processor)

    def limited(self, max_tokens: int) -> OneVisionLayout:
        """Returns the layout that makes images smaller until their tokens are few enough.

        Below the tokens of an image of one tile, every image is shown whole only.

        Raises:
            DataError: A whole image is more.
        """
        side = self.tokens_per_side
        if max_tokens >= side**2 + side * (side + 1):
            return self.model_copy(update={"max_tokens": max_tokens})
        if max_tokens > side**2:
            return self.model_copy(update={"cut": False})
        raise DataError(
            "a whole image becomes more tokens than that",
            where="data.image.max_tokens",
            got=max_tokens,
            expected=f"at least {side**2 + 1}",
        )

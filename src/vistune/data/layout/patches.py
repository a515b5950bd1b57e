"""Images at their own shape, as a grid of patches: Qwen2-VL and later, GLM-4.1V.

An image is resized so that both sides are multiples of `patch_px * merge` and its area lies within
bounds; `merge` x `merge` patches become one token. Positions have three axes (time, row, column):
text counts on all of them, an image's tokens by their place, and what follows goes on behind the
longer side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import model_validator

from vistune.data.layout.base import ImageLayout, unusual_shape
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape

_MOST_ELONGATED = 200


class PatchLayout(ImageLayout):
    """The layout of towers that take a flat list of patches and the grid they came from."""

    kind: Literal["patches"] = "patches"
    """Tells the forms of layout apart."""
    patch_px: PositiveInt
    """Side of a patch."""
    merge: PositiveInt
    """Side of the square of patches that becomes one token."""
    min_pixels: PositiveInt
    """Smaller images are enlarged to about this area."""
    max_pixels: PositiveInt
    """Larger images are shrunk to at most this area."""
    frames: PositiveInt = 1
    """Frames an image counts as where its area is held against the bounds (2 for GLM-4.1V)."""
    enlarge_first: bool = False
    """A side below that of a token is enlarged before anything else is looked at (GLM-4.1V)."""
    enlarge_sides: bool = False
    """The same, one side after the other and rounded (PaddleOCR-VL)."""

    @model_validator(mode="after")
    def _bounds(self) -> PatchLayout:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}")
        return self

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of pixels an image is resized to.

        Raises:
            ImageError: One side is more than 200 times the other.

        Source: the public Qwen2-VL, GLM-4V and PaddleOCR-VL image processors.
        """
        side = self.patch_px * self.merge
        shown = height, width
        if self.enlarge_first and min(height, width) < side:
            scale = max(side / height, side / width)
            height, width = int(height * scale), int(width * scale)
        if self.enlarge_sides and height < side:
            height, width = side, round(width * side / height)
        if self.enlarge_sides and width < side:
            height, width = round(height * side / width), side
        if max(height, width) / min(height, width) > _MOST_ELONGATED:
            raise unusual_shape(
                *shown,
                why=f"one side is more than {_MOST_ELONGATED} times the other",
                fix="cut the image into pieces",
            )
        rows, columns = round(height / side) * side, round(width / side) * side
        area, own = self.frames * rows * columns, self.frames * height * width
        if area > self.max_pixels:
            scale = math.sqrt(own / self.max_pixels)
            rows = max(side, math.floor(height / scale / side) * side)
            columns = max(side, math.floor(width / scale / side) * side)
        elif area < self.min_pixels:
            scale = math.sqrt(self.min_pixels / own)
            rows = math.ceil(height * scale / side) * side
            columns = math.ceil(width * scale / side) * side
        return rows, columns

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (1, rows of patches, columns of patches)."""
        rows, columns = self.resized(height, width)
        return 1, rows // self.patch_px, columns // self.patch_px

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the patches of an image."""
        return math.prod(self.shape(height, width))

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image without the marks around it."""
        return self.num_inputs(height, width) // self.merge**2

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the image token as often as the image has tokens."""
        return np.full(self.num_body(height, width), self.image_token_id, dtype=np.int64)

    def positions(
        self, ids: npt.NDArray[np.int64], shapes: Sequence[ImageShape]
    ) -> npt.NDArray[np.int64]:
        """Returns the positions on the axes of time, row and column: int64 [3, T].

        Source: `get_rope_index` of transformers' Qwen2-VL, for images.
        """
        grids = [(rows // self.merge, columns // self.merge) for _, rows, columns in shapes]
        runs, start = [], 0
        images = iter(grids)
        for is_image, group in itertools.groupby((ids == self.image_token_id).tolist()):
            length = sum(1 for _ in group)
            while length:
                size = length
                if is_image:
                    rows, columns = next(images)
                    size = rows * columns
                    runs.append(_grid(rows, columns) + start)
                    start += max(rows, columns)
                else:
                    runs.append(np.tile(np.arange(size) + start, (3, 1)))
                    start += size
                length -= size
        return np.concatenate(runs, axis=1)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the image at the size the tower sees it."""
        rows, columns = self.resized(image.height, image.width)
        return [image.resize((columns, rows), resample=Image.Resampling.BICUBIC)]

    def limited(self, max_tokens: int) -> PatchLayout:
        """Returns the layout with the bounds on the area lowered to `max_tokens` tokens.

        Sides are whole numbers of tokens, so a very elongated image may still become more.
        """
        if max_tokens < 1:
            raise DataError("an image needs a token", where="data.image.max_tokens", got=max_tokens)
        most = min(self.max_pixels, self.frames * max_tokens * (self.patch_px * self.merge) ** 2)
        # Sides are rounded up where an image is enlarged: a quarter leaves room for that.
        least = min(self.min_pixels, max(1, most // 4))
        size: dict[str, Any] = {"shortest_edge": least, "longest_edge": most}
        processor = {**self.processor, "size": size}
        return self.model_copy(
            update={"min_pixels": least, "max_pixels": most, "processor": processor}
        )


def _grid(rows: int, columns: int) -> npt.NDArray[np.int64]:
    at_row, at_column = np.indices((rows, columns)).reshape(2, -1)
    return np.stack([np.zeros_like(at_row), at_row, at_column])

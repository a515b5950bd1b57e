"""Images at their own shape, a token behind every row: Mistral 3 (Pixtral's tower).

An image is shrunk until its longer side has a given length and made up to whole tokens; smaller
ones are not enlarged. Every row of tokens ends with a break, the last one with another mark.
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

_SMALLEST_SQUARE = 2 * (2 + 1)


class RowBreakLayout(ImageLayout):
    """The layout of Pixtral's tower. The model is told (rows, columns) of patches."""

    kind: Literal["row_breaks"] = "row_breaks"
    """Tells the forms of layout apart."""
    patch_px: PositiveInt
    """Side of a patch."""
    merge: PositiveInt
    """Side of the square of patches that becomes one token."""
    longest_px: PositiveInt
    """Longer sides are shrunk to this."""
    break_id: int
    """The id behind a row of tokens (`[IMG_BREAK]`)."""
    end_id: int
    """The id behind the last row (`[IMG_END]`)."""
    max_tokens: PositiveInt | None = None
    """Most tokens of an image: others are shrunk further."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of tokens.

        Raises:
            ImageError: So elongated that a side would vanish, or has too many tokens at any size,
                or is a single token.
        """
        rows, columns = self._grid(height, width, self._longest(height, width))
        if rows * columns == 1:
            raise unusual_shape(
                height,
                width,
                why="it is a single token, which transformers' model does not take by itself",
                fix=f"enlarge it beyond {self.patch_px * self.merge} pixels",
            )
        return rows, columns

    def _longest(self, height: int, width: int) -> int:
        """Returns the length that longer sides are shrunk to: the largest one that fits."""
        if self.max_tokens is None:
            return self.longest_px
        side = self.patch_px * self.merge
        largest = (min(self.longest_px, max(height, width)) - 1) // side * side
        lengths: list[int] = [self.longest_px, *range(largest, 0, -side)]
        for longest in lengths:
            rows, columns = self._grid(height, width, longest)
            if rows * (columns + 1) <= self.max_tokens and rows * columns > 1:
                return longest
        raise unusual_shape(
            height,
            width,
            why=f"it becomes more than {self.max_tokens:,} tokens at any size",
            fix="raise data.image.max_tokens",
        )

    def _grid(self, height: int, width: int, longest: int) -> tuple[int, int]:
        """Returns (rows, columns) of tokens for one length.

        Source: the public Pixtral image processor.
        """
        shown = height, width
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if not height or not width:
            raise unusual_shape(
                *shown, why="a side would vanish when it is shrunk", fix="cut it into pieces"
            )
        side = self.patch_px * self.merge
        return math.ceil(height / side), math.ceil(width / side)

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (rows, columns) of patches."""
        rows, columns = self.grid(height, width)
        return rows * self.merge, columns * self.merge

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the patches of an image."""
        return math.prod(self.shape(height, width))

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image, breaks included."""
        rows, columns = self.grid(height, width)
        return rows * (columns + 1)

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns rows of image tokens, each with its break."""
        rows, columns = self.grid(height, width)
        ids = np.full((rows, columns + 1), self.image_token_id, dtype=np.int64)
        ids[:, -1] = self.break_id
        ids[-1, -1] = self.end_id
        return ids.reshape(-1)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns patches, row by row: float32 [P, 3, Y, X]."""
        whole, side = self._whole(image), self.patch_px
        channels, height, width = whole.shape
        patches = whole.reshape(channels, height // side, side, width // side, side)
        return np.ascontiguousarray(
            patches.transpose(1, 3, 0, 2, 4).reshape(-1, channels, side, side)
        )

    def _whole(self, image: Image.Image) -> npt.NDArray[np.float32]:
        out = self.image_processor(
            images=[image],
            size={"longest_edge": self._longest(image.height, image.width)},
            patch_size=self.patch_px * self.merge,
            return_tensors="np",
        )
        return np.asarray(out["pixel_values"][0], dtype=np.float32)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the image at the size the tower sees it."""
        return pictures_of(self._whole(image)[None], self.image_processor)

    def limited(self, max_tokens: int) -> RowBreakLayout:
        """Returns the layout that shrinks an image until its tokens are few enough.

        Raises:
            DataError: A square image needs more.
        """
        if max_tokens < _SMALLEST_SQUARE:
            raise DataError(
                "a square image needs two rows of two tokens and a mark",
                where="data.image.max_tokens",
                got=max_tokens,
                expected=f"at least {_SMALLEST_SQUARE}",
            )
        return self.model_copy(update={"max_tokens": max_tokens})

"""A whole image and slices of it, each at a shape of its own: MiniCPM-V 4.6.

An image larger than one slice is cut into a grid whose shape comes nearest to its own; the slices
share one size, the whole image is resized to another. Sides are whole numbers of tokens, the area
is about that of a square slice. Marks stand around each, a line break between rows of slices.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.layout.base import ImageLayout, pictures_of, unusual_shape
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape


class Slicing(NamedTuple):
    """What an image becomes; sizes in patches, zeros where it is not cut."""

    whole_rows: int
    whole_columns: int
    rows: int
    columns: int
    slice_rows: int
    slice_columns: int

    def tiles(self) -> list[tuple[int, int]]:
        """Returns (rows, columns) of patches of the whole image and of every slice."""
        slices = [(self.slice_rows, self.slice_columns)] * (self.rows * self.columns)
        return [(self.whole_rows, self.whole_columns), *slices]


class SliceLayout(ImageLayout):
    """The layout of MiniCPM-V 4.6. The model is told a `Slicing`; inputs are patches."""

    kind: Literal["slices"] = "slices"
    """Tells the forms of layout apart."""
    patch_px: PositiveInt
    """Side of a patch."""
    merge: PositiveInt
    """Side of the square of patches that becomes one token."""
    slice_px: PositiveInt
    """Side of a square slice; other shapes have about its area."""
    max_slices: PositiveInt
    """Most slices of an image; 1: images are not cut."""
    whole_ids: tuple[int, int]
    """What stands around the whole image."""
    slice_ids: tuple[int, int]
    """What stands around a slice."""
    row_end_ids: tuple[int, ...]
    """What stands between two rows of slices (a line break)."""
    max_tokens: PositiveInt | None = None
    """Most tokens of an image: others are cut into fewer slices."""

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns the image's `Slicing`."""
        return self._sliced(height, width, self._most(height, width))

    def _most(self, height: int, width: int) -> int:
        """Returns the bound on an image's slices: the largest whose tokens are few enough."""
        if self.max_tokens is None:
            return self.max_slices
        for most in range(self.max_slices, 0, -1):
            if self._size(self._sliced(height, width, most)) <= self.max_tokens:
                return most
        raise unusual_shape(
            height,
            width,
            why=f"it becomes more than {self.max_tokens:,} tokens even when it is not cut",
            fix="raise data.image.max_tokens, or cut it into pieces",
        )

    def _sliced(self, height: int, width: int, most: int) -> Slicing:
        """Returns the slicing with at most `most` slices.

        Source: the public MiniCPM-V 4.6 image processor.
        """
        rows, columns = self._grid(height, width, most)
        side = self.patch_px
        whole = self._fitted(height, width, resize=not rows or height * width > self.slice_px**2)
        tall, wide = whole[0] // side, whole[1] // side
        if not rows:
            return Slicing(tall, wide, 0, 0, 0, 0)
        part = self._fitted(
            _whole_number(height, rows) / rows, _whole_number(width, columns) / columns, resize=True
        )
        return Slicing(tall, wide, rows, columns, part[0] // side, part[1] // side)

    def _grid(self, height: int, width: int, most: int) -> tuple[int, int]:
        number = min(math.ceil(height * width / self.slice_px**2), most)
        if number <= 1:
            return 0, 0
        best, least = (1, 1), math.inf
        for slices in (number - 1, number, number + 1):
            if slices == 1 or slices > most:
                continue
            for rows in (r for r in range(1, slices + 1) if slices % r == 0):
                columns = slices // rows
                error = abs(math.log(width / height) - math.log(columns / rows))
                if error < least or (error == least and rows > best[0]):
                    best, least = (rows, columns), error
        return best

    def _fitted(self, height: float, width: float, *, resize: bool) -> tuple[int, int]:
        """Returns a size of whole tokens; of the area of a slice where it is resized."""
        if resize:
            ratio = width / height
            height = int(self.slice_px / math.sqrt(ratio))
            width = int(height * ratio)
        unit = self.patch_px * self.merge
        return _whole_number(height, unit), _whole_number(width, unit)

    def num_inputs(self, height: int, width: int) -> int:
        """Returns the patches of the whole image and its slices."""
        tiles = Slicing(*self.shape(height, width)).tiles()
        return sum(rows * columns for rows, columns in tiles)

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image."""
        return self._size(Slicing(*self.shape(height, width)))

    def _size(self, slicing: Slicing) -> int:
        tiles = slicing.tiles()
        breaks = max(0, slicing.rows - 1) * len(self.row_end_ids)
        return sum(r * c // self.merge**2 for r, c in tiles) + 2 * len(tiles) + breaks

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the whole image and the slices row by row, each between its marks."""
        slicing = Slicing(*self.shape(height, width))
        whole, *slices = slicing.tiles()
        ids = self._marked(whole, self.whole_ids)
        for index, tile in enumerate(slices):
            if index and index % slicing.columns == 0:
                ids += self.row_end_ids
            ids += self._marked(tile, self.slice_ids)
        return np.array(ids, dtype=np.int64)

    def _marked(self, tile: tuple[int, int], marks: tuple[int, int]) -> list[int]:
        number = tile[0] * tile[1] // self.merge**2
        return [marks[0], *[self.image_token_id] * number, marks[1]]

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the patches of the whole image and its slices: float32 [P, 3, Y, X]."""
        most = self._most(image.height, image.width)
        out = self.image_processor(images=[image], max_slice_nums=most, return_tensors="np")
        line = np.asarray(out["pixel_values"][0], dtype=np.float32)  # patches side by side
        patches = line.reshape(*line.shape[:2], -1, self.patch_px).transpose(2, 0, 1, 3)
        return np.ascontiguousarray(patches)

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the whole image, and its slices row by row."""
        patches, at = self.pixels(image), 0
        out: list[Image.Image] = []
        for rows, columns in Slicing(*self.shape(image.height, image.width)).tiles():
            part, at = patches[at : at + rows * columns], at + rows * columns
            grid = part.reshape(rows, columns, *part.shape[1:]).transpose(2, 0, 3, 1, 4)
            side = self.patch_px
            tile = grid.reshape(1, -1, rows * side, columns * side)
            out += pictures_of(tile, self.image_processor)
        return out

    def limited(self, max_tokens: int) -> SliceLayout:
        """Returns the layout that cuts an image into fewer slices until its tokens are few enough.

        Raises:
            DataError: A square image that is not cut is more.
        """
        least = (self.slice_px // (self.patch_px * self.merge)) ** 2 + 2
        if max_tokens < least:
            raise DataError(
                "a square image that is not cut becomes more tokens than that",
                where="data.image.max_tokens",
                got=max_tokens,
                expected=f"at least {least}",
            )
        return self.model_copy(update={"max_tokens": max_tokens})


def _whole_number(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)

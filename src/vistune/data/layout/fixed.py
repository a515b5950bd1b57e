"""Images that all become one square and one number of tokens: Gemma 3, PaliGemma.

They differ from the squares of a composed model in that the model's public image processor makes
their pixels, and in the marks around their tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistune.data.layout.base import ImageLayout, pictures_of
from vistune.errors import DataError
from vistune.recipe.base import PositiveInt
from vistune.types import ImageShape


class FixedLayout(ImageLayout):
    """The layout of towers that take one square."""

    kind: Literal["fixed"] = "fixed"
    """Tells the forms of layout apart."""
    tokens: PositiveInt
    """Tokens of an image."""

    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the image token as often as every image has tokens."""
        return np.full(self.tokens, self.image_token_id, dtype=np.int64)

    def num_body(self, height: int, width: int) -> int:
        """Returns the tokens of an image."""
        return self.tokens

    def shape(self, height: int, width: int) -> ImageShape:
        """Returns (1,): the tower sees one square."""
        return (1,)

    def num_inputs(self, height: int, width: int) -> int:
        """Returns 1."""
        return 1

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns the square the tower sees."""
        return pictures_of(self.pixels(image), self.image_processor)

    def limited(self, max_tokens: int) -> FixedLayout:
        """Returns the layout itself, when an image has no more tokens than that.

        Raises:
            DataError: It has.
        """
        if max_tokens < self.tokens:
            raise DataError(
                f"every image of this model becomes {self.tokens} tokens",
                where="data.image.max_tokens",
                got=max_tokens,
                fix="data.image.max_tokens=auto",
            )
        return self

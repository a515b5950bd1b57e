"""Idefics3 and SmolVLM: rows of tiles named by their places, the whole image last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import between, image_token_id, size_px, token_id
from vistune.types import ImageShape, VisionGrid

_MARK, _WHOLE = "<fake_token_around_image>", "<global-img>"
_LARGEST_PX = 4096  # the public processors resize to no more


class Idefics3(CommonFamily):
    """The family."""

    model_types: tuple[str, ...] = ("idefics3", "smolvlm")
    image_marks = ("<image>", "", "")
    spliced_apart: Literal[True] = True
    roles = ModuleMap(
        vision=("model.vision_model",),
        connector=("model.connector",),
        language=("model.text_model",),
        head=("lm_head",),
    )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        return VisionGrid(
            patch_px=int(config.vision_config.patch_size), downsample=int(config.scale_factor)
        )

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `row_tiles`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        if not processor.get("do_resize", True):
            raise ModelError(
                "images that are not resized do not become whole tiles",
                where="preprocessor_config.json: do_resize",
                got=False,
                expected=True,
            )
        longest = size_px(processor, "size", "longest_edge", default=4 * 364)
        tile = size_px(processor, "max_image_size", "longest_edge", default=364)
        tower = int(config.vision_config.image_size)
        if tile != tower:
            raise ModelError(
                "image processor and vision tower disagree on the size of a tile",
                where="preprocessor_config.json: max_image_size",
                got=tile,
                expected=tower,
            )
        split = bool(processor.get("do_image_splitting", True))
        side = range(1, 1 + math.ceil(min(longest, _LARGEST_PX) / tile) if split else 1)
        return {
            "kind": "row_tiles",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": dict(processor),
            "tile_px": tile,
            "longest_px": longest,
            "split": split,
            "tokens_per_tile": self.grid(config).num_tokens(tile, tile),
            "mark_id": token_id(tokenizer, _MARK),
            "whole_id": token_id(tokenizer, _WHOLE),
            "place_ids": [
                [token_id(tokenizer, f"<row_{row}_col_{column}>") for column in side]
                for row in side
            ],
            "row_end_ids": between(tokenizer, _MARK, "\n"),
            "last_row_end_ids": between(tokenizer, _MARK, "\n\n"),
        }

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns the tiles of all images as those of one sample [1, n, 3, Y, X].

        No tile is padded, so there is no mask of pixels to hand over.
        """
        return {"pixel_values": pixel_values[None]}

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of a tile."""
        side = int(config.vision_config.image_size)
        return (1, 3, side, side), ((0, 0),)


register(Idefics3())

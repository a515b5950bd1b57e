"""Pixtral, and Mistral 3 (Mistral Small 3.1 and later), whose projector folds its patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import PIXTRAL, register
from vistune.models.native.marks import image_token_id, size_px, token_id
from vistune.types import ImageShape, VisionGrid


class Mistral3(CommonFamily):
    """The family."""

    model_types: tuple[str, ...] = ("mistral3",)
    image_marks = ("[IMG]", "", "")
    roles = ModuleMap(
        vision=("model.vision_tower",),
        connector=("model.multi_modal_projector",),
        language=("model.language_model",),
        head=("lm_head",),
    )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of tower and projector."""
        return VisionGrid(
            patch_px=int(config.vision_config.patch_size), downsample=int(config.spatial_merge_size)
        )

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns the tower's layers behind the one whose features are taken."""
        taken, number = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
        layers = [taken] if isinstance(taken, int) else taken
        last = max(layer % (number + 1) for layer in layers)
        path = "model.vision_tower.transformer.layers"
        return tuple(f"{path}.{layer}" for layer in range(last, number))

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `row_breaks`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        grid = self.grid(config)
        return {
            "kind": "row_breaks",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": dict(processor),
            "patch_px": grid.patch_px,
            "merge": grid.downsample,
            "longest_px": size_px(processor, "size", "longest_edge", default=1024),
            "break_id": token_id(tokenizer, "[IMG_BREAK]"),
            "end_id": token_id(tokenizer, "[IMG_END]"),
        }

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns images [N, 3, Y, X], padded to the largest, and their sizes [N, 2]."""
        side = pixel_values.shape[-1]
        high, wide = (side * max(shape[axis] for shape in image_shapes) for axis in (0, 1))
        images = pixel_values.new_zeros(len(image_shapes), pixel_values.shape[1], high, wide)
        start = 0
        for index, (rows, columns) in enumerate(image_shapes):
            patches = pixel_values[start : start + rows * columns]
            start += rows * columns
            grid = patches.reshape(rows, columns, *patches.shape[1:]).permute(2, 0, 3, 1, 4)
            image = grid.reshape(-1, rows * side, columns * side)
            images[index, :, : rows * side, : columns * side] = image
        sizes = [[rows * side, columns * side] for rows, columns in image_shapes]
        # Sizes stay on the host, where the model reads them one by one.
        return {"pixel_values": images, "image_sizes": torch.tensor(sizes, dtype=torch.int64)}

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of two tokens' patches: of one alone transformers loses an axis."""
        grid = self.grid(config)
        merge, side = grid.downsample, grid.patch_px
        return (2 * merge**2, 3, side, side), ((merge, 2 * merge),)


class Pixtral(Mistral3):
    """The same tower behind LLaVA's projector, which folds nothing."""

    model_types: tuple[str, ...] = (PIXTRAL,)

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches of the tower, one for each token."""
        return VisionGrid(patch_px=int(config.vision_config.patch_size), downsample=1)

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `row_breaks`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        if config.vision_feature_select_strategy != "full":
            raise ModelError(
                "Pixtral's tower has no class token to leave out",
                where="config.json: vision_feature_select_strategy",
                got=config.vision_feature_select_strategy,
                expected="full",
            )
        return super().layout(config, processor, tokenizer)


register(Mistral3())
register(Pixtral())

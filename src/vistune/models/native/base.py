"""What most families of `contract` answer alike; a family that differs says so itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistune.models.native.contract import one_kind
from vistune.types import ImageShape, VisionGrid


class CommonFamily:
    """Pixels alone are given to the forward pass, and every weight is used."""

    is_recurrent = False

    def image_token_id(self, config: Any) -> int:
        """Returns the id at whose places image embeddings go."""
        return int(config.image_token_id)

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns nothing: every weight is used."""
        return ()

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns what the images became, end to end on the first axis."""
        return {"pixel_values": pixel_values}

    def text_inputs(self, input_ids_BT: Tensor, image_token_id: int) -> dict[str, Tensor]:
        """Returns nothing."""
        return {}


class GridFamily(CommonFamily):
    """Patches at an image's own shape, their grids beside them, positions on three axes."""

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        vision = config.vision_config
        return VisionGrid(
            patch_px=int(vision.patch_size), downsample=int(vision.spatial_merge_size)
        )

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns patches [P, ...] and grids (time, rows, columns) [N, 3]."""
        grids = torch.tensor(image_shapes, dtype=torch.int64, device=pixel_values.device)
        return {"pixel_values": pixel_values, "image_grid_thw": grids}

    def text_inputs(self, input_ids_BT: Tensor, image_token_id: int) -> dict[str, Tensor]:
        """Returns 1 at image tokens."""
        return {"mm_token_type_ids": one_kind(input_ids_BT, image_token_id)}

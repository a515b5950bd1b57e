"""MiniCPM-V 4.6: a whole image and slices of it, a language model with a state along the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import between, image_token_id, token_id
from vistune.types import ImageShape, VisionGrid

_OLDEST = (5, 23)
"""Transformers 5.17 merges patches as if all slices had the shape of the first."""


class MiniCPMV(CommonFamily):
    """The family. Three of four layers of its language model are recurrent."""

    model_types: tuple[str, ...] = ("minicpmv4_6",)
    image_marks = ("<|image_pad|>", "<image_id>{n}</image_id>", "")
    is_recurrent = True
    roles = ModuleMap(
        vision=("model.vision_tower",),
        connector=("model.merger",),
        language=("model.language_model",),
        head=("lm_head",),
    )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding: twice two, in the middle of the tower and behind it."""
        return VisionGrid(patch_px=int(config.vision_config.patch_size), downsample=4)

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `slices`.

        Raises:
            ModelError: transformers is too old, or the files do not fit each other.
        """
        import transformers

        found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if found < _OLDEST:
            raise ModelError(
                "this version of transformers computes MiniCPM-V's image features wrongly where"
                " slices differ in shape",
                got=f"transformers {transformers.__version__}",
                expected="5.23 or later",
                fix="pip install -U transformers",
            )
        grid = self.grid(config)
        given = {
            "downsample_mode": (processor.get("downsample_mode", "16x"), "16x"),
            "use_image_id": (processor.get("use_image_id", True), True),
            "patch_size": (processor.get("patch_size", 14), grid.patch_px),
            "config's downsample_mode": (config.downsample_mode, "16x"),
            "config's merger_times": (config.merger_times, 1),
        }
        for name, (got, expected) in given.items():
            if got != expected:
                raise ModelError(
                    f"this form of MiniCPM-V is not known: {name}",
                    where="preprocessor_config.json, config.json",
                    got=got,
                    expected=expected,
                )
        for mark in ("<image_id>", "</image_id>"):
            token_id(tokenizer, mark)
        slices = processor.get("max_slice_nums", 9) if processor.get("slice_mode", True) else 1
        return {
            "kind": "slices",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": dict(processor),
            "patch_px": grid.patch_px,
            "merge": grid.downsample,
            "slice_px": int(processor.get("scale_resolution", 448)),
            "max_slices": slices,
            "whole_ids": [token_id(tokenizer, mark) for mark in ("<image>", "</image>")],
            "slice_ids": [token_id(tokenizer, mark) for mark in ("<slice>", "</slice>")],
            "row_end_ids": between(tokenizer, "</slice>", "\n"),
        }

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns patches side by side [1, 3, Y, P * X], and patches of every slice [K, 2]."""
        tiles: list[list[int]] = []
        for tall, wide, rows, columns, slice_rows, slice_columns in image_shapes:
            tiles += [[tall, wide], *[[slice_rows, slice_columns]] * (rows * columns)]
        line = pixel_values.permute(1, 2, 0, 3).flatten(2)[None]
        sizes = torch.tensor(tiles, dtype=torch.int32, device=pixel_values.device)
        return {"pixel_values": line, "target_sizes": sizes}

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of one token's patches."""
        side = int(config.vision_config.patch_size)
        return (16, 3, side, side), ((4, 4, 0, 0, 0, 0),)


register(MiniCPMV())

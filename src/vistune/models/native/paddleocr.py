"""PaddleOCR-VL: patches at an image's own shape, positions on three axes, a projector behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import GridFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import image_token_id, size_px
from vistune.types import ImageShape


class PaddleOCRVL(GridFamily):
    """The family. What stands around an image is the chat template's business."""

    model_types: tuple[str, ...] = ("paddleocr_vl",)
    image_marks = ("<|IMAGE_PLACEHOLDER|>", "", "")
    roles = ModuleMap(
        vision=("model.visual",),
        connector=("model.projector",),
        language=("model.language_model",),
        head=("lm_head",),
    )

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `patches`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        grid = self.grid(config)
        names = {"patch_size": grid.patch_px, "merge_size": grid.downsample}
        for name, expected in {**names, "temporal_patch_size": 1}.items():
            if (got := processor.get(name, expected)) != expected:
                raise ModelError(
                    "image processor and vision tower disagree on the patches",
                    where=f"preprocessor_config.json: {name}",
                    got=got,
                    expected=expected,
                )
        bounds: list[int] = []
        public = {"min_pixels": ("shortest_edge", 384**2), "max_pixels": ("longest_edge", 1536**2)}
        for name, (key, default) in public.items():
            said = processor.get(name)  # older files have the bounds at the top
            bounds.append(
                size_px(processor, "size", key, default=default) if said is None else said
            )
        values = {n: v for n, v in processor.items() if n not in public}
        return {
            "kind": "patches",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": {
                **values,
                "size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]},
            },
            "patch_px": grid.patch_px,
            "merge": grid.downsample,
            "min_pixels": bounds[0],
            "max_pixels": bounds[1],
            "enlarge_sides": True,
        }

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of one token's patches."""
        side, merge = int(config.vision_config.patch_size), self.grid(config).downsample
        return (merge**2, 3, side, side), ((1, merge, merge),)


register(PaddleOCRVL())

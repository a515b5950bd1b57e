"""InternVL 2.5 and later in transformers' own form: tiles of 256 tokens and a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import image_token_id, size_px, token_id
from vistune.types import ImageShape, VisionGrid


class InternVL(CommonFamily):
    """The family. Its files say nothing of cutting: the public processor always cuts."""

    model_types: tuple[str, ...] = ("internvl",)
    # Marks as text: what stands behind one is tokenised with it, as some tokenizers need.
    image_marks = ("<IMG_CONTEXT>", "<img>", "</img>")
    roles = ModuleMap(
        vision=("model.vision_tower",),
        connector=("model.multi_modal_projector",),
        language=("model.language_model",),
        head=("lm_head",),
    )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        vision = config.vision_config
        height, width = vision.patch_size
        if height != width:
            raise ModelError("patches are not square", got=vision.patch_size)
        return VisionGrid(patch_px=int(height), downsample=round(1 / config.downsample_ratio))

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns the mask token, which only pretraining of the tower uses, where there is one."""
        has_one = config.vision_config.use_mask_token
        return ("model.vision_tower.embeddings.mask_token",) if has_one else ()

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `ratio_tiles`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        height = size_px(processor, "size", "height", default=384)
        width = size_px(processor, "size", "width", default=384)
        tower = tuple(config.vision_config.image_size)
        if (height, width) != tower:
            raise ModelError(
                "image processor and vision tower disagree on the size of a tile",
                where="preprocessor_config.json: size",
                got=(height, width),
                expected=tower,
            )
        grid = self.grid(config)
        for mark in self.image_marks[1:]:
            token_id(tokenizer, mark)
        bounds = {name: processor.get(name) for name in ("min_patches", "max_patches")}
        least, most = bounds["min_patches"] or 1, bounds["max_patches"] or 12
        cutting = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
        return {
            "kind": "ratio_tiles",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": {**processor, **cutting},
            "tile_height_px": height,
            "tile_width_px": width,
            "tokens_per_tile": grid.num_tokens(height, width),
            "min_tiles": least,
            "max_tiles": most,
        }

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of a tile."""
        return (1, 3, *config.vision_config.image_size), ((1, 1),)


register(InternVL())

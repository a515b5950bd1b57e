"""LLaVA-OneVision: a whole image and its tiles, whose padding and order the model undoes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import image_token_id, size_px
from vistune.types import ImageShape, VisionGrid


class LlavaOneVision(CommonFamily):
    """The family."""

    model_types: tuple[str, ...] = ("llava_onevision",)
    image_marks = ("<image>", "", "")
    roles = ModuleMap(
        vision=("model.vision_tower",),
        connector=("model.multi_modal_projector", "model.image_newline"),
        language=("model.language_model",),
        head=("lm_head",),
    )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        return VisionGrid(patch_px=int(config.vision_config.patch_size), downsample=1)

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns the tower's modules behind the layer whose features are taken."""
        tower, vision = "model.vision_tower", config.vision_config
        taken = config.vision_feature_layer
        layers = [taken] if isinstance(taken, int) else taken
        number = int(vision.num_hidden_layers)
        last = max(layer % (number + 1) for layer in layers)
        unused = [f"{tower}.encoder.layers.{layer}" for layer in range(last, number)]
        return (*unused, f"{tower}.post_layernorm", f"{tower}.head")

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `onevision`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other.
        """
        vision = config.vision_config
        tile, patch = int(vision.image_size), int(vision.patch_size)
        for side in ("height", "width"):
            if (got := size_px(processor, "size", side, default=384)) != tile:
                raise ModelError(
                    "image processor and vision tower disagree on the size of a tile",
                    where=f"preprocessor_config.json: size.{side}",
                    got=got,
                    expected=tile,
                )
        said = processor.get("image_grid_pinpoints")
        sizes = config.image_grid_pinpoints if said is None else said
        if [list(size) for size in sizes] != [list(size) for size in config.image_grid_pinpoints]:
            raise ModelError(
                "image processor and model disagree on the sizes an image can be padded to",
                where="preprocessor_config.json: image_grid_pinpoints",
                fix="copy image_grid_pinpoints from config.json, which the model goes by",
            )
        most = re.fullmatch(r"anyres_max_([1-9][0-9]*)", config.vision_aspect_ratio)
        if most is None or config.vision_feature_select_strategy != "full":
            raise ModelError(
                "this form of LLaVA-OneVision is not known",
                where="config.json: vision_aspect_ratio, vision_feature_select_strategy",
                got=f"{config.vision_aspect_ratio}, {config.vision_feature_select_strategy}",
                expected="anyres_max_9 (or another number), full",
            )
        return {
            "kind": "onevision",
            "image_token_id": image_token_id(config, tokenizer, self.image_marks[0]),
            "processor": {**processor, "image_grid_pinpoints": sizes},
            "tile_px": tile,
            "tokens_per_side": tile // patch,
            "sizes_px": sizes,
            "max_tiles": int(most[1]),
        }

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns the tiles of all images, the images' sizes, and how many belong together.

        Transformers shows an image whole when it is not alone in its sample.
        """
        counts: list[int] = []
        for is_cut, run in itertools.groupby(cut for *_, cut in image_shapes):
            number = len(list(run))
            # One image shown whole is counted as two: only the end of the list takes that, which
            # is enough, because samples with such images have several, or every image is one.
            counts += [1] * number if is_cut else [max(2, number)]
        sizes = [[height, width] for height, width, _ in image_shapes]
        assert sum(counts) == len(sizes) or not image_shapes[-1][-1]
        return {
            "pixel_values": pixel_values,
            # On the host, where the model reads them one by one.
            "image_sizes": torch.tensor(sizes, dtype=torch.int64),
            "batch_num_images": torch.tensor(counts, dtype=torch.int64),
        }

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of an image that is shown whole."""
        side = int(config.vision_config.image_size)
        return (1, 3, side, side), ((side, side, 0),)


register(LlavaOneVision())

"""Gemma 3, PaliGemma and PaliGemma 2: one square for every image, and tokens that look ahead.

In Gemma 3 the tokens of an image see all of their image; in PaliGemma the whole prompt, images
first, is a prefix that sees all of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import CommonFamily
from vistune.models.native.contract import one_kind, register
from vistune.models.native.marks import image_token_id, size_px
from vistune.types import ImageShape, VisionGrid


@dataclass(frozen=True)
class Squares(CommonFamily):
    """A family of SigLIP towers and Gemma language models.

    Args:
        model_types: The `model_type`s of its configs.
        image_text: The token at whose places image embeddings go.
        image_marks: What its chat template writes for an image; text put before and behind.
        reads_prompts_both_ways: Whether prompts are prefixes; otherwise images look ahead.
        first_position: The position of a sample's first token.
        public_size_px: The side that its public image processor takes where a file is silent.
        is_recurrent: See `NativeFamily`.
    """

    model_types: tuple[str, ...]
    image_text: str
    image_marks: tuple[str, str, str]
    reads_prompts_both_ways: bool
    first_position: int
    public_size_px: int
    is_recurrent: bool = False

    @property
    def roles(self) -> ModuleMap:
        """Module paths inside transformers' model."""
        return ModuleMap(
            vision=("model.vision_tower",),
            connector=("model.multi_modal_projector",),
            language=("model.language_model",),
            head=("lm_head",),
        )

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        vision = config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        return VisionGrid(
            patch_px=int(vision.patch_size), downsample=side // round(_tokens(config) ** 0.5)
        )

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns the tower's pooling head, whose output is not used, where it has one."""
        has_head = bool(getattr(config.vision_config, "vision_use_head", True))
        return ("model.vision_tower.head",) if has_head else ()

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `fixed`.

        Raises:
            ModelError: Tokenizer, config and image processor do not fit each other, or images are
                to be cropped as well (pan and scan).
        """
        if processor.get("do_pan_and_scan"):
            raise ModelError(
                "images are to be shown in crops as well, which is not known",
                where="preprocessor_config.json: do_pan_and_scan",
                got=True,
                fix="set it to false, as published",
            )
        tower = int(config.vision_config.image_size)
        for side in ("height", "width"):
            if (got := size_px(processor, "size", side, default=self.public_size_px)) != tower:
                raise ModelError(
                    "image processor and vision tower disagree on the size of an image",
                    where=f"preprocessor_config.json: size.{side}",
                    got=got,
                    expected=tower,
                )
        return {
            "kind": "fixed",
            "image_token_id": image_token_id(config, tokenizer, self.image_text),
            "processor": dict(processor),
            "tokens": _tokens(config),
        }

    def text_inputs(self, input_ids_BT: Tensor, image_token_id: int) -> dict[str, Tensor]:
        """Returns 1 at image tokens; where prompts are prefixes, 0 at all of a prompt's."""
        if self.reads_prompts_both_ways:
            return {"token_type_ids": torch.zeros_like(input_ids_BT)}
        return {"token_type_ids": one_kind(input_ids_BT, image_token_id)}

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of an image."""
        side = int(config.vision_config.image_size)
        return (1, 3, side, side), ((1,),)


def _tokens(config: Any) -> int:
    """Tokens of an image: Gemma 3 pools patches to a number of its own."""
    pooled = getattr(config, "mm_tokens_per_image", None)
    vision = config.vision_config
    return int(pooled or (int(vision.image_size) // int(vision.patch_size)) ** 2)


GEMMA3 = Squares(
    ("gemma3",),
    image_text="<image_soft_token>",
    image_marks=("<start_of_image>", "\n\n<start_of_image>", "<end_of_image>\n\n"),
    reads_prompts_both_ways=False,
    first_position=0,
    public_size_px=224,
)
PALIGEMMA = Squares(
    ("paligemma",),
    image_text="<image>",
    image_marks=("<image>", "", ""),
    reads_prompts_both_ways=True,
    first_position=1,
    public_size_px=224,
)
for _family in (GEMMA3, PALIGEMMA):
    register(_family)

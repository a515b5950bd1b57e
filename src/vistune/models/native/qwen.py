"""Images at their own shape as patches, positions on three axes: Qwen2-VL and later, GLM-4.1V."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.models.native.base import GridFamily
from vistune.models.native.contract import register
from vistune.models.native.marks import image_token_id, token_id
from vistune.types import ImageShape

_PUBLIC = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
"""What the public image processors take where their file says nothing."""


@dataclass(frozen=True)
class Patches(GridFamily):
    """A family whose tower takes a flat list of patches and the grids they came from.

    Args:
        model_types: The `model_type`s of its configs.
        open_text: The token in front of an image.
        image_text: The image token.
        close_text: The token behind an image.
        connector: Modules of the tower that fold patches into tokens.
        counts_frames: The bounds on an image's area are for as many frames as one patch spans, and
            what is smaller than a token is enlarged first.
    """

    model_types: tuple[str, ...]
    open_text: str
    image_text: str
    close_text: str
    connector: tuple[str, ...]
    counts_frames: bool = False
    takes_patches: Literal[True] = True

    @property
    def image_marks(self) -> tuple[str, str, str]:
        """What its chat template writes for an image; nothing is put around its tokens."""
        return f"{self.open_text}{self.image_text}{self.close_text}", "", ""

    @property
    def roles(self) -> ModuleMap:
        """Module paths: what folds patches into tokens is the connector."""
        return ModuleMap(
            vision=("model.visual",),
            connector=self.connector,
            language=("model.language_model",),
            head=("lm_head",),
        )

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the layout `patches`.

        Raises:
            ModelError: The processor's file does not say how large images may be, or the tokenizer
                is another model's.
        """
        _check_patches(config.vision_config, processor)
        said = processor.get("size")
        size = said if isinstance(said, Mapping) else {}
        # Older files have the bounds at the top, or under other names inside of `size`.
        least = _first(
            processor.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")
        )
        most = _first(processor.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"))
        if least is None or most is None:
            raise ModelError(
                "the image processor's file does not say how large images may be",
                where="preprocessor_config.json",
                got=f"size {said}",
                expected="size with shortest_edge and longest_edge, or min_pixels and max_pixels",
            )
        grid = self.grid(config)
        values = {n: v for n, v in processor.items() if n not in ("min_pixels", "max_pixels")}
        frames = int(config.vision_config.temporal_patch_size) if self.counts_frames else 1
        return {
            "kind": "patches",
            "image_token_id": image_token_id(config, tokenizer, self.image_text),
            "before": [token_id(tokenizer, self.open_text)],
            "after": [token_id(tokenizer, self.close_text)],
            "processor": {**values, "size": {"shortest_edge": least, "longest_edge": most}},
            "patch_px": grid.patch_px,
            "merge": grid.downsample,
            "min_pixels": least,
            "max_pixels": most,
            "frames": frames,
            "enlarge_first": self.counts_frames,
        }

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of one token's patches."""
        vision = config.vision_config
        side, merge = int(vision.patch_size), int(vision.spatial_merge_size)
        channels = int(getattr(vision, "in_channels", 3))
        values = channels * int(vision.temporal_patch_size) * side**2
        return (merge**2, values), ((1, merge, merge),)


def _check_patches(vision: Any, processor: Mapping[str, Any]) -> None:
    """Refuses an image processor that cuts other patches than the tower reads.

    Raises:
        ModelError: They disagree.
    """
    names = {"patch_size": "patch_size", "merge_size": "spatial_merge_size"}
    names["temporal_patch_size"] = "temporal_patch_size"
    for name, own in names.items():
        got, expected = processor.get(name, _PUBLIC[name]), int(getattr(vision, own))
        if got != expected:
            raise ModelError(
                "image processor and vision tower disagree on the patches",
                where=f"preprocessor_config.json: {name}",
                got=got,
                expected=expected,
                fix="bring back the file that the model was published with",
            )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


QWEN = Patches(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    open_text="<|vision_start|>",
    image_text="<|image_pad|>",
    close_text="<|vision_end|>",
    connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
)
GLM = Patches(
    ("glm4v",),
    open_text="<|begin_of_image|>",
    image_text="<|image|>",
    close_text="<|end_of_image|>",
    connector=("model.visual.downsample", "model.visual.merger"),
    counts_frames=True,
)
register(QWEN)
register(GLM)

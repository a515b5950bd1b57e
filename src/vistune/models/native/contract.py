"""What has to be known of one of transformers' own vision-language models to train it here.

Everything else comes from the model's class and its directory. A family says which modules play
which role, how its images become tokens (as values of `data.layout`), and under which names its
forward pass takes what the layout says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.contract import ModuleMap
from vistune.registry import Registry
from vistune.types import ImageDefaults, ImageShape, VisionGrid


class NativeFamily(Protocol):
    """One family of transformers' own models."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """The `model_type`s of its configs."""
        ...

    @property
    def image_marks(self) -> tuple[str, str, str]:
        """What its chat template writes for an image; text put before and behind its tokens."""
        ...

    @property
    def is_recurrent(self) -> bool:
        """Whether its language model carries a state from token to token.

        A packed row would hand it on to the next sample: samples then run one by one.
        """
        ...

    @property
    def roles(self) -> ModuleMap:
        """Module paths inside transformers' model."""
        ...

    def image_token_id(self, config: Any) -> int:
        """Returns the id at whose places image embeddings go."""
        ...

    def grid(self, config: Any) -> VisionGrid:
        """Returns patches and folding of the tower."""
        ...

    def untrained(self, config: Any) -> tuple[str, ...]:
        """Returns modules and parameters inside transformers' model that no gradient reaches."""
        ...

    def layout(self, config: Any, processor: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the image layout, as values of `data.layout`.

        Args:
            config: The model's config.
            processor: The values of its image processor's file.
            tokenizer: Its tokenizer.

        Raises:
            ModelError: The processor's file lacks a value.
        """
        ...

    def image_inputs(
        self, pixel_values: Tensor, image_shapes: tuple[ImageShape, ...]
    ) -> dict[str, Tensor]:
        """Returns a row's images under the names `get_image_features` takes.

        Args:
            pixel_values: What the images became, end to end on the first axis.
            image_shapes: What the layout says of each.
        """
        ...

    def text_inputs(self, input_ids_BT: Tensor, image_token_id: int) -> dict[str, Tensor]:
        """Returns what the forward pass wants to know of the ids beside them.

        Args:
            input_ids_BT: int64 [B, T].
            image_token_id: The id of image tokens.
        """
        ...

    def blank(self, config: Any) -> tuple[tuple[int, ...], tuple[ImageShape, ...]]:
        """Returns the shape of the smallest image's pixels, and what is said of that image."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """What a family says besides whose tokens see some of what follows them."""

    @property
    def reads_prompts_both_ways(self) -> bool:
        """Whether all that stands in front of an answer is a prefix that sees all of itself.

        Otherwise it is the tokens of an image that see all of their image.
        """
        ...

    @property
    def first_position(self) -> int:
        """The position of a sample's first token."""
        ...


@runtime_checkable
class TakesPatches(Protocol):
    """A family whose tower takes the images of a row end to end, with their boundaries."""

    @property
    def takes_patches(self) -> Literal[True]:
        """Says so; other families do not have it."""
        ...


@runtime_checkable
class SplicedApart(Protocol):
    """A family whose features are put among the embeddings here.

    Its own class does that for one format of both alone: embeddings that train are fp32, features
    of a run in bf16 are not (SmolVLM up to transformers 5.17 at least).
    """

    @property
    def spliced_apart(self) -> Literal[True]:
        """Says so; other families do not have it."""
        ...


PIXTRAL = "llava with pixtral"
"""The name here of a model whose config is LLaVA's and whose tower is Pixtral's."""


def native_name(model_type: str | None, vision_type: str | None) -> str:
    """Returns the name of a family in `NATIVE`, whether or not there is such a family.

    Args:
        model_type: Of the config.
        vision_type: Of the config of its tower.
    """
    if model_type == "llava" and vision_type == "pixtral":
        return PIXTRAL
    return model_type or ""


NATIVE: Registry[NativeFamily] = Registry("transformers model")
"""The families, by `native_name`: mostly the `model_type`."""


def register(family: NativeFamily) -> None:
    """Files a family under each of its model types."""
    for model_type in family.model_types:
        NATIVE.register(model_type)(family)


def defaults_of(processor: Mapping[str, Any], grid: VisionGrid) -> ImageDefaults:
    """Returns how files are read for a family: its layout decides on everything else.

    Args:
        processor: The values of its image processor's file.
        grid: Of its tower.

    Raises:
        ModelError: Mean or deviation of the channels is not three numbers.
    """
    mean, std = (_channels(processor, name) for name in ("image_mean", "image_std"))
    return ImageDefaults(grid.patch_px * grid.downsample, mean, std, mode="resize")


def _channels(processor: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = processor.get(name)
    if values is None:
        return 0.5, 0.5, 0.5
    numbers = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(numbers) != 3 or not all(isinstance(n, (int, float)) for n in numbers):
        raise ModelError(
            "an image processor gives one number for each of three channels",
            where=f"preprocessor_config.json: {name}",
            got=values,
        )
    red, green, blue = map(float, numbers)
    return red, green, blue


def one_kind(ids_BT: Tensor, image_token_id: int) -> Tensor:
    """Returns 1 at image tokens and 0 elsewhere: int32, as transformers' processors do."""
    return (ids_BT == image_token_id).to(torch.int32)

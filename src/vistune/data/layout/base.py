"""How an image becomes tower inputs and tokens, for models that do not make every image one square.

A layout is pure data and travels in the checkpoint. The block of tokens an image becomes is a pure
function of the height and width of its file; so is what the model is told of it. Pixels come from
the model's public image processor in its Pillow form, which needs no torchvision.
"""

from __future__ import annotations

import functools
import importlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from vistune.errors import DataError, ImageError
from vistune.recipe import Section
from vistune.types import ImageShape


class ImageLayout(Section):
    """The tokens and tower inputs of images of any size."""

    kind: str
    """Tells the forms of layout apart in a checkpoint."""
    image_token_id: Annotated[int, Field(ge=0)]
    """The id at whose places image embeddings go."""
    processor: dict[str, Any]
    """Values of the public image processor; `image_processor_type` names its class."""

    before: tuple[int, ...] = ()
    """Ids in front of every image (a mark that opens it)."""
    after: tuple[int, ...] = ()
    """Ids behind every image."""

    def block(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the ids an image of `height` x `width` pixels becomes: int64 [K].

        Raises:
            ImageError: The model has no form for an image of this shape.
        """
        body = self.body(height, width)
        if not self.before and not self.after:
            return body
        return np.concatenate([self.before, body, self.after]).astype(np.int64, copy=False)

    def num_tokens(self, height: int, width: int) -> int:
        """Returns the length of the block."""
        return len(self.before) + self.num_body(height, width) + len(self.after)

    @abstractmethod
    def body(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Returns the block without the marks around it."""

    def num_body(self, height: int, width: int) -> int:
        """Returns the length of the body."""
        return int(self.body(height, width).size)

    @abstractmethod
    def shape(self, height: int, width: int) -> ImageShape:
        """Returns what the model is told of an image of `height` x `width` pixels."""

    def positions(
        self, ids: npt.NDArray[np.int64], shapes: Sequence[ImageShape]
    ) -> npt.NDArray[np.int64] | None:
        """Returns the positions of a sample's tokens, where they are not 0, 1, 2, ...

        Args:
            ids: int64 [T]; one sample.
            shapes: Of its images, in reading order.

        Returns:
            int64 [A, T], one row for each axis; None for the plain count.
        """
        return None

    def pixels(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the tower's inputs for one image: float32, the first axis counts them.

        Args:
            image: A Pillow image in mode RGB.
        """
        out = self.image_processor(images=[image], return_tensors="np")
        return np.asarray(out["pixel_values"], dtype=np.float32)

    @abstractmethod
    def num_inputs(self, height: int, width: int) -> int:
        """Returns the length of the first axis of `pixels` for an image of that size."""

    def pictures(self, image: Image.Image) -> list[Image.Image]:
        """Returns what the tower sees of an image, for a person to look at (mode RGB)."""
        return [image]

    def among(self, num_images: int) -> ImageLayout:
        """Returns the layout of the images of a sample that has `num_images` of them.

        Some models show several images each at less detail than a single one.
        """
        return self

    @abstractmethod
    def limited(self, max_tokens: int) -> ImageLayout:
        """Returns the layout that makes at most `max_tokens` tokens of an image.

        Raises:
            DataError: No image would become so few.
        """

    def require(self) -> None:
        """Makes sure that images can be prepared here, before any is.

        Raises:
            DataError: The public image processor has no form without torchvision.
        """
        if self.processor:
            _ = self.image_processor

    @property
    def image_processor(self) -> Any:
        """The public image processor; every process makes one when it first asks for it."""
        return _made(json.dumps(self.processor, sort_keys=True))


def make_image_processor(values: dict[str, Any]) -> Any:
    """Returns a transformers image processor in its Pillow form.

    Args:
        values: As in a `preprocessor_config.json`.

    Raises:
        DataError: transformers has no such class, or none that works on Pillow images.
    """
    return _made(json.dumps(values, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _made(text: str) -> Any:
    values: dict[str, Any] = json.loads(text)
    made = _processor_class(str(values.get("image_processor_type")))
    try:
        return made(**_arguments(values))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "the image processor cannot be made from the values of its file",
            where="preprocessor_config.json",
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="bring back the file that the model was published with",
        ) from error


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    names = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}
    return {name: value for name, value in values.items() if name not in names}


@functools.cache
def _processor_class(name: str) -> Any:
    import transformers

    plain = name.removesuffix("Fast").removesuffix("Pil")
    for candidate in (f"{plain}Pil", plain):
        found = getattr(transformers, candidate, None)
        module = "" if found is None else str(found.__module__)
        if ".image_processing_pil_" in module:
            # From its module: transformers 5.17 puts a class that asks for torchvision in the place
            # of some that only mention it (5.23 does not).
            return getattr(importlib.import_module(module), candidate)
    raise DataError(
        f"transformers has no image processor {plain} that works without torchvision",
        where="preprocessor_config.json",
        got=f"image_processor_type {name}",
        expected=f"a class {plain}Pil in transformers",
        fix="use a release of transformers that has it",
    )


def pictures_of(pixels: npt.NDArray[np.float32], processor: Any) -> list[Image.Image]:
    """Returns tower inputs as pictures again, as an image processor's mean and deviation say.

    Args:
        pixels: float32 [n, 3, Y, X].
        processor: A transformers image processor.
    """
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (processor.image_mean, processor.image_std))
    levels = np.rint((pixels * std + mean) / processor.rescale_factor).clip(0, 255)
    return [Image.fromarray(tile.transpose(1, 2, 0)) for tile in levels.astype(np.uint8)]


def unusual_shape(height: int, width: int, *, why: str, fix: str) -> ImageError:
    """Returns the error of an image that a model has no form for.

    Args:
        height: Its pixel rows.
        width: Its pixel columns.
        why: What the model cannot do.
        fix: What would help.
    """
    return ImageError(
        f"{width} x {height} pixels: {why}", reason="image_shape_unsupported", fix=fix
    )

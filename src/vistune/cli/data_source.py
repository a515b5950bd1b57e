"""A dataset named on the command line in place of a recipe: what `vistune data` verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vistune.data.image import ImagePlan
    from vistune.recipe import SourceConfig


class Format(StrEnum):
    """Names of dataset formats."""

    LLAVA = "llava"
    SHAREGPT = "sharegpt"
    MESSAGES = "messages"
    XTUNER = "xtuner"
    ALPACA = "alpaca"
    VISUALGLM = "visualglm"
    DATA_JUICER = "data_juicer"
    COCO_CAPTIONS = "coco_captions"
    COGVLM_SFT = "cogvlm_sft"
    WEBDATASET = "webdataset"
    IMAGE_FOLDER = "image_folder"
    CAPTIONS_CSV = "captions_csv"


Target = Annotated[
    str,
    typer.Argument(metavar="RECIPE|PATH", help="A recipe, or a dataset (see --format)."),
]
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", "-f", help="With PATH: how it is written. llava when left out."),
]
ImagesOption = Annotated[
    Path | None, typer.Option(help="With PATH: folder of the images; the file's own if not.")
]


def source_of(
    target: str, *, format: Format | None, images: Path | None, overrides: Sequence[str]
) -> SourceConfig | None:
    """Returns the dataset that a target names, or None where it names a recipe.

    A target is a dataset when a format is named for it, or when it ends in .json, .jsonl or
    .parquet, which no recipe does.

    Args:
        target: What the user named.
        format: The format named.
        images: The image folder named.
        overrides: key=value pairs, which only a recipe takes.

    Raises:
        RecipeError: Options of the one kind are given with the other.
    """
    from vistune.errors import RecipeError
    from vistune.recipe import SourceConfig

    if format is None and Path(target).suffix not in (".json", ".jsonl", ".parquet"):
        if images is not None:
            raise RecipeError(
                "--images belongs to a dataset; a recipe names its own", fix="leave it out"
            )
        return None
    if overrides:
        raise RecipeError(
            "key=value needs a recipe", got=overrides[0], fix="name a recipe instead of a file"
        )
    return SourceConfig(
        path=target,
        format=(format or Format.LLAVA).value,
        images=None if images is None else str(images),
    )


def plain_plan() -> ImagePlan:
    """Returns an image plan for datasets that no model is named for."""
    from vistune.data.image import ImagePlan
    from vistune.recipe import ImageConfig
    from vistune.types import ImageDefaults

    return ImagePlan.resolve(ImageConfig(), ImageDefaults(336, (0.5,) * 3, (0.5,) * 3))

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
    typer.Argument(
        metavar="RECIPE|PATH",
        help="A recipe, or a dataset: a file, a folder or shards with wildcards.",
    ),
]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format", "-f", help="With PATH: how it is written; found out from it when left out."
    ),
]
ImagesOption = Annotated[
    Path | None, typer.Option(help="With PATH: folder of the images; the file's own if not.")
]


def source_of(
    target: str, *, format: Format | None, images: Path | None, overrides: Sequence[str]
) -> SourceConfig | None:
    """Returns the dataset that a target names, or None where it names a recipe.

    A target is a recipe when it is the name of a shipped one, ends in .yaml or .yml, or is nothing
    on disk; everything else is a dataset.

    Args:
        target: What the user named.
        format: The format named; found out from the dataset when left out.
        images: The image folder named.
        overrides: key=value pairs, which only a recipe takes.

    Raises:
        RecipeError: Options of the one kind are given with the other.
        DataError: It is a dataset of no known format, or could be several.
    """
    from vistune.errors import RecipeError

    if format is None and _is_recipe(target):
        if images is not None:
            raise RecipeError(
                "--images belongs to a dataset; a recipe names its own", fix="leave it out"
            )
        return None
    if overrides:
        raise RecipeError(
            "key=value needs a recipe", got=overrides[0], fix="name a recipe instead of a dataset"
        )
    return dataset_of(target, format=format, images=images)


def dataset_of(path: str, *, format: Format | None, images: Path | None) -> SourceConfig:
    """Returns a dataset as a recipe would describe it.

    Args:
        path: Where it is.
        format: How it is written; found out when left out.
        images: The folder of its images.

    Raises:
        DataError: It is of no known format, or could be several.
    """
    from vistune.recipe import SourceConfig

    folder = None if images is None else str(images)
    if format is not None:
        return SourceConfig(path=path, format=format.value, images=folder)
    from vistune.data.detect import detect

    found = detect(path)
    return SourceConfig(path=found.path, format=found.format, images=folder)


def _is_recipe(target: str) -> bool:
    from vistune.recipe import shipped_recipes

    path = Path(target)
    if path.suffix in (".yaml", ".yml") or target in shipped_recipes():
        return True
    # A data file that is not there is called so, and not an unknown recipe.
    is_data = path.suffix in (".json", ".jsonl", ".parquet", ".tar", ".csv", ".tsv")
    return not (path.exists() or is_data or any(char in target for char in "*?[{"))


def plain_plan() -> ImagePlan:
    """Returns an image plan for datasets that no model is named for."""
    from vistune.data.image import ImagePlan
    from vistune.recipe import ImageConfig
    from vistune.types import ImageDefaults

    return ImagePlan.resolve(ImageConfig(), ImageDefaults(336, (0.5,) * 3, (0.5,) * 3))

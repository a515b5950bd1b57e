"""The tokens of images that are seen as a whole and in tiles (LLaVA-1.6's `spatial_unpad`).

Which tiles an image has, and what of them is canvas, the data layer says (`data.layout.anyres`);
this is the model's side of it. No tower runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vistune.errors import ModelError
from vistune.models.facts import ModelFacts
from vistune.recipe import TilesConfig
from vistune.types import ImageShape


class Tiles(nn.Module):
    """Lays out the embeddings of views as an image's tokens.

    Args:
        width: Width of an embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_newline = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.image_newline, std=width**-0.5)

    def forward(
        self, views_NPD: Tensor, image_shapes: Sequence[ImageShape], *, scale: float = 1.0
    ) -> Tensor:
        """Returns the embeddings of all images, in reading order.

        Args:
            views_NPD: Embeddings of every view; P is a square.
            image_shapes: Of each image: rows and columns of tiles, and rows and columns of
                embeddings that are cut off on each side.
            scale: Factor on the newline, that of image embeddings.

        Returns:
            [K, D]; of each image the whole view, then rows of tiles that a newline ends.

        Raises:
            ModelError: There are not as many views as the images have.

        Source: transformers' and the original LLaVA-1.6.
        """
        counts = [1 + shape[0] * shape[1] for shape in image_shapes]
        if sum(counts) != views_NPD.shape[0]:
            raise ModelError(
                "the views of images and what is said of the images do not match",
                got=f"{views_NPD.shape[0]} views, {sum(counts)} by image_shapes",
                fix="give the model the pixels and the shapes that the encoder made",
            )
        newline = self.image_newline.to(views_NPD.dtype)
        newline = newline if scale == 1.0 else newline * scale
        parts: list[Tensor] = []
        split = torch.split(views_NPD, counts)
        for views, shape in zip(split, image_shapes, strict=True):
            parts += [views[0], _rows(views[1:], shape, newline)]
        return torch.cat(parts)


def _rows(tiles: Tensor, shape: ImageShape, newline: Tensor) -> Tensor:
    """Tiles [rows * columns, P, D] as one picture of embeddings, cut and with newlines: [K, D]."""
    rows, columns, cut_rows, cut_columns = shape
    side, width = round(tiles.shape[1] ** 0.5), tiles.shape[2]
    picture = tiles.view(rows, columns, side, side, width).transpose(1, 2)
    picture = picture.reshape(rows * side, columns * side, width)
    picture = picture[cut_rows : rows * side - cut_rows, cut_columns : columns * side - cut_columns]
    ends = newline.expand(picture.shape[0], 1, width)
    return torch.cat((picture, ends), dim=1).flatten(0, 1)


def new_tiles(width: int, *, seed: int) -> Tiles:
    """Returns tiles whose newline depends on `seed` alone.

    Args:
        width: Width of an embedding.
        seed: The seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiles(width)


def with_tiles(facts: ModelFacts, tiles: TilesConfig, *, where: str) -> ModelFacts:
    """Returns the facts of a model whose images are cut into tiles.

    Args:
        facts: Of a model that makes every image one square.
        tiles: The grids.
        where: For messages.

    Raises:
        ModelError: The model's images have a form that is not cut into tiles.
    """
    plan, grid, defaults = facts.tower, facts.grid, facts.image_defaults
    reason = None
    if plan is None or facts.layout is not None:
        reason = "its images have a form of their own"
    elif plan.scales or plan.select != "patch":
        reason = "its tower joins scales" if plan.scales else "its tower keeps the class token"
    if reason is not None:
        raise ModelError(
            f"this model's images cannot be cut into tiles: {reason}",
            where=where,
            fix="leave model.tiles out",
        )
    side = grid.fixed_size_px or defaults.size_px
    layout: dict[str, Any] = {
        "kind": "anyres",
        "image_token_id": facts.image_token_id,
        "plan": {
            "mode": "resize",
            "size_px": side,
            "mean": list(defaults.mean),
            "std": list(defaults.std),
            "resample": defaults.resample,
        },
        "tile_tokens": side // grid.patch_px // grid.downsample,
        "grids": [list(one) for one in tiles.grids],
    }
    return replace(facts, layout=layout, image_defaults=replace(defaults, mode="resize"))


def grids_of(
    pinpoints: Sequence[Sequence[int]], side: int, *, swapped: bool, where: str
) -> TilesConfig:
    """Returns tiles from the sizes of canvas that public configs name.

    Args:
        pinpoints: Two sides of each canvas, in pixels.
        side: Side of a tile.
        swapped: Whether the width stands first (the original LLaVA's configs).
        where: File, for messages.

    Raises:
        ModelError: A canvas is not made of whole tiles.
    """
    if not pinpoints or any(len(one) != 2 or one[0] % side or one[1] % side for one in pinpoints):
        raise ModelError(
            "the canvases are not made of whole tiles",
            where=where,
            got=f"image_grid_pinpoints {pinpoints}",
            expected=f"pairs of multiples of {side}, the side of the tower's input",
        )
    grids = [(one[0] // side, one[1] // side) for one in pinpoints]
    return TilesConfig(grids=tuple((b, a) if swapped else (a, b) for a, b in grids))


def pinpoints_of(grids: Sequence[tuple[int, int]], side: int, *, swapped: bool) -> list[list[int]]:
    """Returns the inverse of `grids_of`.

    Args:
        grids: (rows, columns) of tiles.
        side: Side of a tile in pixels.
        swapped: Whether the width stands first.
    """
    pairs = [(columns, rows) if swapped else (rows, columns) for rows, columns in grids]
    return [[first * side, second * side] for first, second in pairs]


def square_of(grid: tuple[int, int], view_tokens: int) -> tuple[int, int]:
    """Returns tokens and views of a square image in a grid: few tokens for the tower's work.

    Args:
        grid: (rows, columns) of tiles.
        view_tokens: Tokens of one view.
    """
    short, side = min(grid), round(view_tokens**0.5)
    return view_tokens + short * side * (short * side + 1), 1 + grid[0] * grid[1]


def tiles_of(facts: ModelFacts) -> TilesConfig | None:
    """Returns the tiles of a described model's images, or None."""
    layout = facts.layout
    if layout is None or layout["kind"] != "anyres":
        return None
    return TilesConfig.model_validate({"grids": layout["grids"]})

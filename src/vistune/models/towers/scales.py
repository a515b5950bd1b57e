"""Multi-scale features (S2): one tower sees an image at several sizes, its features are joined.

Each larger size is cut into squares of the smallest, which the tower takes one by one; their
features are laid out again, averaged down to the smallest size's grid, and joined by channel. The
number of tokens stays that of the smallest size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.errors import ModelError

_KEY = "model.vision_tower.s2"


def check_scales(
    scales: Sequence[int], *, fixed_px: int | None, patch_px: int, keeps_class: bool
) -> None:
    """Refuses sizes that do not fit a tower.

    Args:
        scales: Sides in pixels, smallest first.
        fixed_px: The one side the tower takes, or None.
        patch_px: Side of its patches.
        keeps_class: Whether its class token is kept.

    Raises:
        ModelError: The smallest is not the tower's, another is no multiple of it, or a class token
            is in the way.
    """
    smallest = scales[0]
    if keeps_class:
        raise ModelError(
            "a class token has no place in a grid, so its scales cannot be joined",
            where=_KEY,
            fix="set model.vision_tower.select=patch",
        )
    if (fixed_px is not None and smallest != fixed_px) or smallest % patch_px:
        raise ModelError(
            "the smallest scale must be what the tower takes",
            where=_KEY,
            got=smallest,
            expected=fixed_px if fixed_px is not None else f"a multiple of {patch_px}",
        )
    if any(side % smallest for side in scales):
        raise ModelError(
            "an image is cut into squares of the smallest scale, so every scale must be a multiple"
            " of it",
            where=_KEY,
            got=", ".join(map(str, scales)),
            expected=f"multiples of {smallest}",
        )


def scaled_features(
    features: Callable[[Tensor], Tensor], pixel_values_NCYX: Tensor, scales: Sequence[int]
) -> Tensor:
    """Runs a tower at every scale.

    Args:
        features: From pixels at the smallest scale to [N, P, D], P a square of patches.
        pixel_values_NCYX: Images at the largest scale.
        scales: Sides in pixels, smallest first, each a multiple of the first.

    Returns:
        [N, P, D * scales], P as at the smallest scale.

    Raises:
        ModelError: The images are not of the largest scale.

    Source: LLaVA's `CLIPVisionTowerS2` on "When Do We Not Need Larger Vision Models?"; smaller
        sizes are made of the normalised pixels by bicubic interpolation without antialiasing.
    """
    if tuple(pixel_values_NCYX.shape[-2:]) != (scales[-1], scales[-1]):
        raise ModelError(
            "the tower is given images of another side than its largest scale",
            got=tuple(pixel_values_NCYX.shape[-2:]),
            expected=scales[-1],
            fix="set data.image.size_px=auto",
        )
    grids = [
        _at_scale(features, pixel_values_NCYX, side, num_cuts=side // scales[0]) for side in scales
    ]
    rows = grids[0].shape[-2]
    return torch.cat([_averaged(grid, rows) for grid in grids], dim=1).flatten(2).transpose(1, 2)


def _at_scale(
    features: Callable[[Tensor], Tensor], pixels_NCYX: Tensor, side: int, *, num_cuts: int
) -> Tensor:
    """Features of one scale, laid out as a picture: [N, D, rows, columns]."""
    num_images = pixels_NCYX.shape[0]
    if pixels_NCYX.shape[-1] != side:
        dtype = pixels_NCYX.dtype
        pixels_NCYX = F.interpolate(pixels_NCYX.float(), size=(side, side), mode="bicubic")
        pixels_NCYX = pixels_NCYX.to(dtype)
    cut = side // num_cuts
    squares = pixels_NCYX.reshape(num_images, -1, num_cuts, cut, num_cuts, cut)
    squares = squares.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    found_NPD = features(squares)
    rows = round(found_NPD.shape[1] ** 0.5)
    grid = found_NPD.view(num_images, num_cuts, num_cuts, rows, rows, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _averaged(grid_NDYX: Tensor, rows: int) -> Tensor:
    if grid_NDYX.shape[-1] == rows:
        return grid_NDYX
    wide = F.interpolate(grid_NDYX.float(), size=(rows, rows), mode="area")
    return wide.to(grid_NDYX.dtype)

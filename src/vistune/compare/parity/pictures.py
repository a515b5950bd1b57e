"""What LLaVA's and MGM's dumps share: pictures before the tower, and image slots in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vistune.data.image import ImagePlan
from vistune.types import IGNORE_INDEX

PLACEHOLDER = -200
"""The id that stands for a whole image in these dumps."""


def prepared(
    picture_YXC: Tensor, *, square: bool, side_px: int, settings: dict[str, Any]
) -> Tensor:
    """Returns a picture as the tower sees it, [3, side, side].

    Args:
        picture_YXC: uint8, the source.
        square: Paste on a square first; else the longer side is cut.
        side_px: Side of the input.
        settings: Holds `image_mean` and `image_std`.
    """
    plan = ImagePlan(
        mode="pad" if square else "crop",
        size_px=side_px,
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        resample="bicubic",
    )
    return torch.from_numpy(plan.apply(Image.fromarray(picture_YXC.numpy())))


@dataclass(frozen=True)
class Spliced:
    """Rows with every image as a run of tokens, padded to one length.

    Args:
        ids: int64 [B, T].
        labels: int64 [B, T].
        mask: int64 [B, T], 0 at padding.
        positions: int64 [B, T], from 0 on at real tokens, 0 at padding.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor


def spliced(
    ids_BT: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    *,
    num_image_tokens: int,
    image_token_id: int,
    left: bool = False,
    max_tokens: int | None = None,
) -> Spliced:
    """Replaces placeholders by image tokens without a label, cuts, and pads.

    Args:
        ids_BT: int64 [B, T], `PLACEHOLDER` for an image.
        labels_BT: int64 [B, T].
        mask_BT: [B, T], 0 at padding.
        num_image_tokens: Tokens of an image.
        image_token_id: The id written at them.
        left: Pad on the left.
        max_tokens: Longest row; None for no limit.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    for ids, labels, mask in zip(ids_BT, labels_BT, mask_BT, strict=True):
        kept = mask.bool()
        ids, labels = ids[kept], labels[kept]
        is_image = ids == PLACEHOLDER
        times = torch.where(is_image, num_image_tokens, 1)
        long_ids = ids.masked_fill(is_image, image_token_id).repeat_interleave(times)
        long_labels = labels.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(times)
        rows.append((long_ids[:max_tokens], long_labels[:max_tokens]))
    longest = max(ids.numel() for ids, _ in rows)

    def padded(parts: list[Tensor], fill: int) -> Tensor:
        out = torch.full((len(parts), longest), fill, dtype=torch.int64)
        for row, part in zip(out, parts, strict=True):
            size = part.numel()
            row[longest - size if left else 0 : longest if left else size] = part
        return out

    return Spliced(
        ids=padded([ids for ids, _ in rows], 0),
        labels=padded([labels for _, labels in rows], IGNORE_INDEX),
        mask=padded([torch.ones_like(ids) for ids, _ in rows], 0),
        positions=padded([torch.arange(ids.numel()) for ids, _ in rows], 0),
    )

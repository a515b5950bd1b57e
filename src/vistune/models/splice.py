"""Puts image embeddings in their places among text embeddings. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vistune import _compat
from vistune.errors import ModelError


def splice(text_BTD: Tensor, at_image_BT: Tensor, images_KD: Tensor | None) -> Tensor:
    """Replaces the embeddings at image positions.

    Args:
        text_BTD: [B, T, D]; what stands at image positions is thrown away.
        at_image_BT: bool [B, T].
        images_KD: [K, D], the embeddings of all images in reading order; None for no image.

    Returns:
        [B, T, D].

    Raises:
        ModelError: There are more or fewer image positions than embeddings; see `image_places`.
    """
    places_K = image_places(at_image_BT, 0 if images_KD is None else images_KD.shape[0])
    if images_KD is None:
        return text_BTD
    images_KD = images_KD.to(text_BTD.dtype)
    return text_BTD.flatten(0, 1).index_copy(0, places_K, images_KD).view_as(text_BTD)


def idle(
    image_embeddings: Callable[[Tensor], Tensor],
    modules: Iterable[nn.Module],
    *,
    side_px: int,
    like: Tensor,
    always: bool,
) -> Tensor:
    """Returns a zero that depends on every trained weight of modules a text row does not need.

    Without it a row of text alone would leave gradients missing, and with several processes the
    others would wait for them for ever.

    Args:
        image_embeddings: From pixels to embeddings.
        modules: What it runs.
        side_px: Side of its input.
        like: Gives device and number format.
        always: Run the modules even when none of their weights train (they are sharded).
    """
    zero = like.new_zeros(())
    if not torch.is_grad_enabled():
        return zero
    if not always and not any(p.requires_grad for m in modules for p in m.parameters()):
        return zero
    blank = like.new_zeros(1, 3, side_px, side_px)
    return image_embeddings(blank).sum().to(like.dtype) * 0.0


def image_places(is_image_BT: Tensor, num_features: int) -> Tensor:
    """Returns where image tokens stand in the flattened batch, in reading order: int64 [K].

    Args:
        is_image_BT: bool [B, T].
        num_features: Image embeddings there are.

    Raises:
        ModelError: They are not as many as image features. On CUDA the device stops instead:
            reading the count would make the host wait for it at every step.
    """
    is_image_T = is_image_BT.flatten()
    if is_image_T.device.type == "meta":
        return torch.empty(num_features, dtype=torch.int64, device="meta")
    if is_image_T.is_cuda:
        _compat.assert_on_device(
            is_image_T.sum() == num_features, "image tokens and images do not match in number"
        )
        # A stable sort puts the image tokens first, in order; `nonzero` would wait.
        order_T = is_image_T.to(torch.uint8).sort(descending=True, stable=True).indices
        return order_T[:num_features]
    places_K = is_image_T.nonzero()[:, 0]
    if places_K.shape[0] != num_features:
        raise ModelError(
            "image tokens and images do not match in number",
            got=f"{places_K.shape[0]} image tokens, {num_features} image features",
            fix="give the model every image that its ids stand for, and no others",
        )
    return places_K

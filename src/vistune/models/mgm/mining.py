"""MGM's connector: patch-info mining, then an MLP.

Every low-resolution patch asks the window of the high-resolution map that covers the same part of
the picture, and adds what it finds. The number of tokens does not change.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vistune.models.connectors import build_connector

_NORM_EPS = 1e-5


def _projection(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(num_in, eps=_NORM_EPS), nn.Linear(num_in, num_out))


def tiles(pictures_NCYX: Tensor, *, count: int) -> Tensor:
    """Cuts pictures or maps into count x count tiles.

    Args:
        pictures_NCYX: [N, C, Y, X]; `count` divides both sides.
        count: Tiles along each side.

    Returns:
        [N, count x count, C, Y / count, X / count], tiles in reading order.
    """
    num_images, channels, height, width = pictures_NCYX.shape
    cut = pictures_NCYX.reshape(num_images, channels, count, height // count, count, width // count)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def windows(maps_NCYX: Tensor, *, num_patches: int) -> Tensor:
    """Cuts a map into one window per low-resolution patch.

    Args:
        maps_NCYX: [N, C, S, S].
        num_patches: Patches P = g x g of the low-resolution picture; g divides S.

    Returns:
        [N, P, W, C]: patches and the W positions of each window in reading order.
    """
    side = round(num_patches**0.5)
    assert side * side == num_patches, f"{num_patches} patches are not a square"
    assert maps_NCYX.shape[-1] % side == 0, f"{maps_NCYX.shape[-1]} is not a multiple of {side}"
    parts = tiles(maps_NCYX, count=side)
    return parts.permute(0, 1, 3, 4, 2).flatten(2, 3)


class PatchInfoMining(nn.Module):
    """Attention of each patch over its own window, one head, no output projection.

    Args:
        num_low: Width of the low-resolution features.
        num_high: Channels of the high-resolution map.
    """

    def __init__(self, num_low: int, num_high: int) -> None:
        super().__init__()
        self.query = _projection(num_low, num_low)
        self.key = _projection(num_high, num_low)
        self.value = _projection(num_high, num_low)

    def forward(self, low_NPC: Tensor, maps_NCYX: Tensor) -> Tensor:
        """Returns what the patches found, [N, P, C], before it is added to them."""
        window_NPWC = windows(maps_NCYX, num_patches=low_NPC.shape[1])
        query = self.query(low_NPC)[:, :, None]
        # Patches stand where heads do: each has its own keys.
        found = F.scaled_dot_product_attention(
            query, self.key(window_NPWC), self.value(window_NPWC)
        )
        return found[:, :, 0]


class MGMConnector(nn.Module):
    """Mining, residual sum, MLP.

    Args:
        num_low: Width of the low-resolution features.
        num_high: Channels of the high-resolution map.
        num_out: Width of the language model.
        kind: The MLP, such as `mlp2x_gelu`.
    """

    def __init__(self, num_low: int, num_high: int, num_out: int, *, kind: str) -> None:
        super().__init__()
        self.mining = PatchInfoMining(num_low, num_high)
        self.projector = build_connector(kind, num_in=num_low, num_out=num_out)

    def forward(self, low_NPC: Tensor, maps_NCYX: Tensor) -> Tensor:
        """Returns embeddings [N, P, D]."""
        out: Tensor = self.projector(low_NPC + self.mining(low_NPC, maps_NCYX))
        return out

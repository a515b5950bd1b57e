"""MGM's vision path as its public code computes it, over the modules and weights of ours.

The baseline of families.py: a key and a value for every position of the high-resolution map, the
map interpolated by way of an fp32 copy, frozen towers under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.mining import PatchInfoMining


class ShippedMining(PatchInfoMining):
    """Mining with keys and values of all positions."""

    def forward(self, low_NPC: Tensor, maps_NCYX: Tensor) -> Tensor:
        """Returns what the patches found, [N, P, C]."""
        side = round(low_NPC.shape[1] ** 0.5)
        num_images, channels, height, width = maps_NCYX.shape
        cut = maps_NCYX.reshape(num_images, channels, side, height // side, side, width // side)
        parts = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        window_NPWC = parts.permute(0, 1, 3, 4, 2).flatten(2, 3)
        query = self.query(low_NPC)[:, :, None]
        found = F.scaled_dot_product_attention(
            query, self.key(window_NPWC), self.value(window_NPWC)
        )
        return found[:, :, 0]


class ShippedMGM(MGMForConditionalGeneration):
    """An MGM whose pictures go the public code's way."""

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        mining = self.connector.mining
        num_low, num_high = mining.query[1].in_features, mining.key[1].in_features
        self.connector.mining = ShippedMining(num_low, num_high)

    def low_features(self, pictures_NCYX: Tensor) -> Tensor:
        """Returns CLIP's features, [N, P, C]."""
        out = self.vision_tower(pictures_NCYX, output_hidden_states=True)
        features: Tensor = out.hidden_states[self.config.vision_select_layer][:, 1:]
        return features

    def high_features(self, pixels_NCYX: Tensor) -> Tensor:
        """Returns the joined map, [N, C, Y, X]."""
        maps, stages = self.vision_tower_aux.vision_stem(pixels_NCYX), []
        for stage in self.vision_tower_aux.vision_stages:
            maps = stage(maps)
            stages.append(maps)
        size = stages[0].shape[-2:]
        enlarged = [
            F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False).to(m.dtype)
            for m in stages[1:]
        ]
        return torch.cat([stages[0], *enlarged], dim=1)

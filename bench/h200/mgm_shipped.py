"""MGM's vision path as its public code computes it, over the modules and weights of ours.

The baseline of families.py: a key and a value for every position of the high-resolution map, the
map interpolated by way of an fp32 copy, frozen towers under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.mining import PatchInfoMining, windows


class ShippedMining(PatchInfoMining):
    """Mining with keys and values of all positions."""

    def forward(self, low_NPC: Tensor, maps_NCYX: Tensor) -> Tensor:
        """Returns what the patches found, [N, P, C]."""
        window_NPWC = windows(maps_NCYX, num_patches=low_NPC.shape[1])
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
        stages: list[Tensor] = self.vision_tower_aux(pixels_NCYX)
        size = stages[0].shape[-2:]
        enlarged = [
            F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False).to(m.dtype)
            for m in stages[1:]
        ]
        return torch.cat([stages[0], *enlarged], dim=1)

"""Rotary position embedding in the two precisions a CogVLM2 decoder can be run in.

Source: RoFormer (Su et al., 2021), half-split form; CogVLM2-Llama3-chat-19B, remote code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistune.models.cogvlm2.config import CogVLM2Config


def inverse_frequencies(config: CogVLM2Config, device: torch.device | None = None) -> Tensor:
    """Returns theta^(-2i / d) for i in 0 .. d/2 - 1, float32 [d / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / (config.rope_theta ** (exponent / config.head_dim))


class StoredFrequencies(nn.Module):
    """The frequencies that every layer of the public state dict stores.

    Only the "public" precision reads them, and only those of the first layer: all are equal. They
    are kept so that a state dict is the public one, tensor for tensor.
    """

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(config))


def rotary_tables(
    position_ids_BT: Tensor, stored: Tensor, *, config: CogVLM2Config, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        position_ids_BT: int64 [B, T].
        stored: `inv_freq` of the state dict, in the weights' format.
        config: Names the precision.
        dtype: Format of the activations.

    Returns:
        Two tensors [B, T, 1, d / 2], to multiply heads with; float32 unless the precision is
        "public", then `dtype`.
    """
    if config.rotary_precision == "public":
        # Positions, products and tables each round to the stored format, as the public code does.
        angles = position_ids_BT.to(stored.dtype)[..., None, None] * stored
        return angles.cos().to(dtype), angles.sin().to(dtype)
    frequencies = inverse_frequencies(config, position_ids_BT.device)
    angles = position_ids_BT.float()[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + d/2) of every head by its position's angle, in float32.

    Args:
        x_BTHD: Queries or keys, [B, T, H, d].
        tables: From `rotary_tables`.

    Returns:
        [B, T, H, d] in the format of `x_BTHD`.
    """
    cos, sin = (table.float() for table in tables)
    first, second = x_BTHD.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BTHD.dtype)

"""EVA2-CLIP-E and CogVLM2's connector: pixels to the vectors the decoder reads.

The tower's blocks norm the *output* of each sub-layer (`x + norm(attention(x))`), there is no norm
before a sub-layer and none after the last block: weights of a pre-norm EVA load under the same
names and compute something else. The attribute names are the public ones, so a state dict is the
public layout; which parts are the tower and which the connector is said by the model's ModuleMap.

Source: CogVLM (Wang et al., 2023), section 2; CogVLM2-Llama3-chat-19B, remote code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from vistune.models.cogvlm2.config import CONNECTOR_STRIDE, CogVLM2Config, CogVLM2VisionConfig

_CONNECTOR_NORM_EPS = 1e-5


class PatchEmbedding(nn.Module):
    """Pixels to patch vectors, a class vector in front, learned positions added."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Maps [N, C, Y, X] to [N, 1 + P, D], patches row by row."""
        patches_NPD = self.proj(pixel_values_NCYX).flatten(2).transpose(1, 2)
        class_N1D = self.cls_embedding.expand(patches_NPD.shape[0], 1, -1)
        x_NPD = torch.cat([class_N1D, patches_NPD], dim=1)
        positions_P = torch.arange(x_NPD.shape[1], device=x_NPD.device)
        embedded: Tensor = x_NPD + self.position_embedding(positions_P)
        return embedded


class VisionAttention(nn.Module):
    """Attention of every patch to every patch, one fused projection for queries, keys, values."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Maps [N, P, D] to [N, P, D]."""
        num_images, num_patches, width = x_NPD.shape
        # The projection's rows are three thirds (queries, keys, values), heads inside each third.
        qkv = self.query_key_value(x_NPD).view(num_images, num_patches, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.dense(mixed.transpose(1, 2).reshape(num_images, num_patches, width))
        return out


class VisionMLP(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Maps [N, P, D] to [N, P, D]."""
        out: Tensor = self.fc2(self.activation(self.fc1(x_NPD)))
        return out


class VisionBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and MLP, each normed after it is computed and before it is added."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Maps [N, P, D] to [N, P, D]."""
        x_NPD = x_NPD + self.input_layernorm(self.attention(x_NPD))
        out: Tensor = x_NPD + self.post_attention_layernorm(self.mlp(x_NPD))
        return out


class VisionTransformer(nn.Module):
    """The tower's blocks; nothing follows the last one."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Maps [N, P, D] to [N, P, D]."""
        for layer in self.layers:
            x_NPD = layer(x_NPD)
        return x_NPD


class GatedProjection(nn.Module):
    """Width of the tower to width of the decoder: a linear map, a norm, then a SwiGLU."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=_CONNECTOR_NORM_EPS)
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.dense_h_to_4h = nn.Linear(width, wide, bias=False)
        self.dense_4h_to_h = nn.Linear(wide, width, bias=False)

    def forward(self, x_NKD: Tensor) -> Tensor:
        """Maps [N, K, tower width] to [N, K, decoder width]."""
        x_NKD = F.gelu(self.norm1(self.linear_proj(x_NKD)))
        gated = F.silu(self.gate_proj(x_NKD)) * self.dense_h_to_4h(x_NKD)
        out: Tensor = self.dense_4h_to_h(gated)
        return out


class VisionPath(nn.Module):
    """Tower and connector in the order of the public state dict.

    Args:
        config: Shape of the whole model.
    """

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        vision, width = config.vision_config, config.vision_config.hidden_size
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = VisionTransformer(vision)
        self.conv = nn.Conv2d(width, width, kernel_size=CONNECTOR_STRIDE, stride=CONNECTOR_STRIDE)
        self.linear_proj = GatedProjection(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def tower(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Patch features of the tower, the class position dropped.

        Args:
            pixel_values_NCYX: Square images [N, C, Y, X].

        Returns:
            [N, P, tower width], patches row by row.
        """
        pixels = pixel_values_NCYX.to(self.patch_embedding.proj.weight.dtype)
        features: Tensor = self.transformer(self.patch_embedding(pixels))
        return features[:, 1:]

    def connector(self, features_NPD: Tensor) -> Tensor:
        """Patch features to decoder vectors: folded 2 x 2, projected, marked begin and end.

        Args:
            features_NPD: [N, P, tower width]; P is the square of an even number.

        Returns:
            [N, K, decoder width] with K = P / 4 + 2.
        """
        num_images, num_patches, width = features_NPD.shape
        side = round(num_patches**0.5)
        grid = features_NPD.transpose(1, 2).reshape(num_images, width, side, side)
        folded_NKD = self.conv(grid).flatten(2).transpose(1, 2)
        patches_NKD = self.linear_proj(folded_NKD)
        # Under autocast the projection is in half precision while the marks keep their own format.
        marks = (
            mark.to(patches_NKD.dtype).expand(num_images, 1, -1) for mark in (self.boi, self.eoi)
        )
        boi_N1D, eoi_N1D = marks
        return torch.cat([boi_N1D, patches_NKD, eoi_N1D], dim=1)

    def forward(self, pixel_values_NCYX: Tensor) -> Tensor:
        """Maps [N, C, Y, X] to [N, K, decoder width]."""
        return self.connector(self.tower(pixel_values_NCYX))

"""The stem and the four stages of an OpenCLIP ConvNeXt, as MGM's high-resolution tower.

Only what MGM keeps: no norm after the stages, no head, no text tower. Parameter names are the
public checkpoints'. Blocks are ConvNeXt-V1's: depthwise 7x7, LayerNorm, MLP with exact GELU, layer
scale. Maps leave the tower stage by stage; `joined_map` lays them over one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune.device import has_triton

_NORM_EPS = 1e-6
_MLP_RATIO = 4


def _kernels(maps: Tensor) -> ModuleType | None:
    """Returns the Triton kernels where they run: forward only, in the weights' own format."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(maps.device.type):
        return None
    if not has_triton(maps.device):
        return None
    from vistune.models.mgm import triton_ops

    return triton_ops


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, Y, X]."""

    def forward(self, maps_NCYX: Tensor) -> Tensor:
        """Returns [N, C, Y, X]."""
        return super().forward(maps_NCYX.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtMLP(nn.Module):
    """Linear, exact GELU, linear, on the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Returns the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(states)))
        return out


class ConvNeXtBlock(nn.Module):
    """One residual block.

    Args:
        width: Channels.
        drop_path_rate: Probability, in training, of leaving the block out for an image.
    """

    def __init__(self, width: int, *, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.conv_dw = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = ConvNeXtMLP(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, maps_NCYX: Tensor) -> Tensor:
        """Returns [N, C, Y, X]."""
        ops = _kernels(maps_NCYX)
        if ops is None:
            normed_NYXC = self.norm(self.conv_dw(maps_NCYX).permute(0, 2, 3, 1))
        else:
            assert self.conv_dw.bias is not None
            normed_NYXC = ops.depthwise_norm(
                maps_NCYX,
                self.conv_dw.weight,
                self.conv_dw.bias,
                self.norm.weight,
                self.norm.bias,
                eps=self.norm.eps,
            ).permute(0, 2, 3, 1)
        change, scale = self.mlp(normed_NYXC).permute(0, 3, 1, 2), self.gamma[:, None, None]
        if self.training and self.drop_path_rate > 0.0:
            keep = 1.0 - self.drop_path_rate
            kept = torch.rand(change.shape[0], 1, 1, 1, device=change.device) < keep
            change = change * kept.to(change.dtype) / keep
        if ops is not None:
            return torch.addcmul(maps_NCYX, change, scale)
        # Under autocast `addcmul` would keep the change in fp32.
        out: Tensor = maps_NCYX + change * scale
        return out


class ConvNeXtStage(nn.Module):
    """Halves the map (but for the first stage), then runs its blocks."""

    def __init__(self, num_in: int, width: int, *, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.downsample: nn.Module = (
            nn.Identity()
            if num_in == width
            else nn.Sequential(
                ChannelNorm(num_in, eps=_NORM_EPS),
                nn.Conv2d(num_in, width, kernel_size=2, stride=2),
            )
        )
        self.blocks = nn.Sequential(
            *(ConvNeXtBlock(width, drop_path_rate=rate) for rate in drop_path_rates)
        )

    def forward(self, maps_NCYX: Tensor) -> Tensor:
        """Returns the stage's map."""
        out: Tensor = self.blocks(self.downsample(maps_NCYX))
        return out


class ConvNeXtStages(nn.Module):
    """Stem and stages.

    Args:
        widths: Channels of each stage.
        depths: Blocks of each stage.
        drop_path_rate: Stochastic depth of the last block in training; it grows linearly from 0
            at the first. 0 is off.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], *, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        num_blocks = sum(depths)
        rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        self.vision_stem = nn.Sequential(
            nn.Conv2d(3, widths[0], kernel_size=4, stride=4),
            ChannelNorm(widths[0], eps=_NORM_EPS),
        )
        stages = []
        num_in = widths[0]
        for stage, width in enumerate(widths):
            first = sum(depths[:stage])
            stage_rates = rates[first : first + depths[stage]]
            stages.append(ConvNeXtStage(num_in, width, drop_path_rates=stage_rates))
            num_in = width
        self.vision_stages = nn.ModuleList(stages)

    def forward(self, pixels_NCYX: Tensor) -> list[Tensor]:
        """Returns the stages' maps, finest first.

        Args:
            pixels_NCYX: float [N, 3, Y, X], normalised; sides are multiples of 32.
        """
        # Channels last throughout: norms and MLPs read them so, and depthwise convolutions run
        # several times as fast.
        maps = self.vision_stem(pixels_NCYX.contiguous(memory_format=torch.channels_last))
        out = []
        for stage in self.vision_stages:
            maps = stage(maps)
            out.append(maps)
        return out


def joined_map(stages: Sequence[Tensor]) -> Tensor:
    """Enlarges every stage's map to the finest and joins them along the channels.

    Torch interpolates in fp32 whatever the format and rounds once, which is what MGM does.

    Returns:
        [N, sum of widths, Y, X] in the stages' number format and order in memory.
    """
    ops = _kernels(stages[0])
    if ops is not None:
        joined: Tensor = ops.joined_map(stages)
        return joined
    size = stages[0].shape[-2:]
    enlarged = [
        F.interpolate(maps, size=size, mode="bilinear", align_corners=False) for maps in stages[1:]
    ]
    return torch.cat([stages[0], *enlarged], dim=1)

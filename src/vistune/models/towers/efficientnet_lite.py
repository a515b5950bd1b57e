"""EfficientNet-Lite as a vision tower: the small convolutional trunk of the embedded default.

It is a plain-torch trunk with the interface of a transformers model (`save_pretrained`,
`from_pretrained`, a config). It is not a classifier: pooling and the ImageNet head are left out.
Batch normalisation is folded into the convolutions when weights are imported, so the trunk
computes the same numbers in training and evaluation mode and keeps no running statistics.

Source: "EfficientNet: Rethinking Model Scaling for CNNs" (Tan and Le, 2019), table 1, in the Lite
variant: no squeeze-and-excitation, ReLU6, stem and head of fixed width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from vistune.errors import ModelError, WeightsError

# (kernel, stride, expansion, output channels, repeats) of the seven stages of Lite0.
LITE0_STAGES: tuple[tuple[int, int, int, int, int], ...] = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
GRID_STRIDE_PX = 32
HEAD = "head"
_BATCH_NORM_EPS = 1e-3
_BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of an EfficientNet-Lite trunk and the features it hands out.

    Args:
        image_size: Default input edge in pixels, a multiple of 32. Other multiples also run.
        stem_channels: Channels after the first convolution.
        head_channels: Channels of the last 1x1 convolution.
        stages: One row per stage: kernel, stride, expansion, output channels, repeats.
        feature_maps: Which maps make up a patch's feature vector, in this order: "head" (the
            last 1x1 convolution) or "stage1" to "stage7" (a stage's output). A map finer than
            one cell per 32 pixels is folded, space to depth, so the number of patches stays.
        normalize: Whether each map's vector is brought to mean 0 and variance 1 over its
            channels, without learned parts. The raw maps differ in scale about thirtyfold, so
            maps side by side would not weigh alike.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 224,
        stem_channels: int = 32,
        head_channels: int = 1280,
        stages: list[list[int]] | tuple[tuple[int, int, int, int, int], ...] = LITE0_STAGES,
        feature_maps: list[str] | tuple[str, ...] = (HEAD,),
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.stem_channels = stem_channels
        self.head_channels = head_channels
        self.stages = [list(stage) for stage in stages]
        self.feature_maps = list(feature_maps)
        self.normalize = normalize
        self.patch_size = GRID_STRIDE_PX
        widths = _feature_widths(self.stages, head_channels=head_channels)
        for name in self.feature_maps:
            if name not in widths:
                raise ModelError(
                    "this tower has no feature map of that name",
                    where="feature_maps",
                    got=name,
                    expected=", ".join(widths),
                )
        self.hidden_size = sum(widths[name] for name in self.feature_maps)
        super().__init__(**kwargs)


def _feature_widths(stages: list[list[int]], *, head_channels: int) -> dict[str, int]:
    """Width of a patch's feature vector for each feature map, after folding."""
    widths: dict[str, int] = {}
    stride_px = 2
    for index, (_, stride, _, channels, _) in enumerate(stages, start=1):
        stride_px *= stride
        widths[f"stage{index}"] = channels * (GRID_STRIDE_PX // stride_px) ** 2
    if stride_px != GRID_STRIDE_PX:
        raise ModelError(
            "the stages do not reduce the image by the tower's grid",
            where="stages",
            got=f"{stride_px} px per cell",
            expected=f"{GRID_STRIDE_PX} px per cell",
        )
    widths[HEAD] = head_channels
    return widths


class _Conv(nn.Module):
    """Convolution with bias, 'same' padding and an optional ReLU6.

    With an even input and stride 2 the padding is one less before than after, which is what the
    original weights were trained with; `nn.Conv2d(padding=...)` alone would shift the image.
    """

    def __init__(
        self, num_in: int, num_out: int, *, kernel: int, stride: int, groups: int, act: bool
    ) -> None:
        super().__init__()
        same = (kernel - 1) // 2
        self.conv = nn.Conv2d(
            num_in, num_out, kernel, stride, padding=same if stride == 1 else 0, groups=groups
        )
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.pad = (before, after, before, after) if stride > 1 else None
        self.act = act

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H / stride, W / stride]."""
        if self.pad is not None:
            x_NCHW = F.pad(x_NCHW, self.pad)
        y_NCHW: Tensor = self.conv(x_NCHW)
        return F.relu6(y_NCHW) if self.act else y_NCHW


class _Block(nn.Module):
    """Inverted bottleneck: widen (1x1), mix space (depthwise), narrow (1x1), add if shapes fit."""

    def __init__(
        self, num_in: int, num_out: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = num_in * expansion
        self.expand = (
            _Conv(num_in, wide, kernel=1, stride=1, groups=1, act=True) if expansion > 1 else None
        )
        self.depthwise = _Conv(wide, wide, kernel=kernel, stride=stride, groups=wide, act=True)
        self.project = _Conv(wide, num_out, kernel=1, stride=1, groups=1, act=False)
        self.residual = stride == 1 and num_in == num_out

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C', H / stride, W / stride]."""
        y_NCHW: Tensor = x_NCHW if self.expand is None else self.expand(x_NCHW)
        y_NCHW = self.project(self.depthwise(y_NCHW))
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class EfficientNetLiteModel(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite trunk whose output is one feature vector per 32x32 pixel cell.

    Args:
        config: The shape of the trunk.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "trunk"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.feature_maps: tuple[str, ...] = tuple(config.feature_maps)
        self.normalize: bool = config.normalize
        width = config.stem_channels
        self.stem = _Conv(3, width, kernel=3, stride=2, groups=1, act=True)
        stages: list[nn.Module] = []
        for kernel, stride, expansion, num_out, repeats in config.stages:
            blocks: list[nn.Module] = []
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(
                    _Block(width, num_out, kernel=kernel, stride=step, expansion=expansion)
                )
                width = num_out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = _Conv(width, config.head_channels, kernel=1, stride=1, groups=1, act=True)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        """Computes patch features.

        Args:
            pixel_values: Normalised images [N, 3, H, W], float; H and W multiples of 32.

        Returns:
            `last_hidden_state` [N, P, D]: P = H/32 * W/32 cells row by row from the top left,
            D = `config.hidden_size`.

        Raises:
            ModelError: An edge is not a multiple of 32.
        """
        height, width = pixel_values.shape[-2:]
        if height % GRID_STRIDE_PX or width % GRID_STRIDE_PX:
            raise ModelError(
                "the tower reads cells of 32 pixels",
                got=f"{height}x{width} px",
                expected="height and width that are multiples of 32",
            )
        # Depthwise convolutions on a CPU run about twice as fast with the channels innermost.
        x_NCHW = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        maps: dict[str, Tensor] = {}
        for index, stage in enumerate(self.stages, start=1):
            x_NCHW = stage(x_NCHW)
            maps[f"stage{index}"] = x_NCHW
        if HEAD in self.feature_maps:
            maps[HEAD] = self.head(x_NCHW)
        cells = [self._cells(maps[name], width) for name in self.feature_maps]
        return BaseModelOutput(last_hidden_state=torch.cat(cells, dim=-1))

    def _cells(self, map_NCYX: Tensor, width_px: int) -> Tensor:
        """Folds a map to the 32-pixel grid: [N, C, Y, X] to [N, P, D]."""
        fold = map_NCYX.shape[-1] * GRID_STRIDE_PX // width_px
        cells_NPD = F.pixel_unshuffle(map_NCYX, fold).flatten(2).transpose(1, 2).contiguous()
        return F.layer_norm(cells_NPD, cells_NPD.shape[-1:]) if self.normalize else cells_NPD


def import_weights(
    tensors: Mapping[str, Tensor], *, config: EfficientNetLiteConfig
) -> dict[str, Tensor]:
    """Renames and folds the weights of the usual PyTorch release to this tower's keys.

    A convolution w without bias followed by y = g (x - m) / sqrt(v + eps) + b equals a
    convolution with weight w * g / sqrt(v + eps) and bias b - m g / sqrt(v + eps).

    Args:
        tensors: The state dict with keys `_conv_stem.weight`, `_bn0.*`, `_blocks.N.*`,
            `_conv_head.weight`, `_bn1.*`; the classifier `_fc.*` is not used.
        config: The shape the weights must have.

    Returns:
        A state dict for `EfficientNetLiteModel(config)`, float32.

    Raises:
        WeightsError: A tensor is missing, of another shape, or left over.

    Source: the key names of lukemelas/EfficientNet-PyTorch and its Lite port.
    """
    remaining = dict(tensors)
    folded: dict[str, Tensor] = {}

    def fold(ours: str, conv: str, norm: str) -> None:
        try:
            weight = remaining.pop(f"{conv}.weight").float()
            scale, bias, mean, variance = (
                remaining.pop(f"{norm}.{part}").float() for part in _BATCH_NORM_PARTS
            )
        except KeyError as missing:
            raise WeightsError(
                "a tensor is missing", where=ours, expected=missing.args[0]
            ) from None
        remaining.pop(f"{norm}.num_batches_tracked", None)
        gain = scale / torch.sqrt(variance + _BATCH_NORM_EPS)
        folded[f"{ours}.conv.weight"] = (weight * gain[:, None, None, None]).contiguous()
        folded[f"{ours}.conv.bias"] = bias - mean * gain

    fold("stem", "_conv_stem", "_bn0")
    number = 0
    for stage, (_, _, expansion, _, repeats) in enumerate(config.stages):
        for index in range(repeats):
            ours, theirs = f"stages.{stage}.{index}", f"_blocks.{number}"
            if expansion > 1:
                fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
            fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
            fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
            number += 1
    fold("head", "_conv_head", "_bn1")
    leftover = sorted(key for key in remaining if not key.startswith("_fc."))
    if leftover:
        raise WeightsError("tensors are left over", got=", ".join(leftover[:4]))
    return folded

"""MGM's connector: patch-info mining, then an MLP.

Every low-resolution patch asks the window of the high-resolution map that covers the same part of
the picture, and adds what it finds. The number of tokens does not change.

Keys and values are never made. A patch has one query and a window of W positions, so the key
projection is moved to the query and the value projection behind the sum over the window, each W
times less work; with x the normalised positions (without gain and bias), g and b of a norm:

    score_w = q . (W_k (g_k x_w + b_k) + c_k) = (g_k W_k^T q) . x_w + what is the same for all w
    found   = sum_w a_w (W_v (g_v x_w + b_v) + c_v) = (W_v g_v) (sum_w a_w x_w) + (W_v b_v + c_v)

The softmax takes no notice of what is the same for the whole window: `b_k` and `c_k` change nothing
and their gradients are zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vistune.device import has_triton
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
        [N, count x count, C, Y / count, X / count], tiles in reading order; several are copied
        into channels-last order.
    """
    num_images, channels, height, width = pictures_NCYX.shape
    cut = pictures_NCYX.reshape(num_images, channels, count, height // count, count, width // count)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).movedim(-1, 2)


def windows(maps_NCYX: Tensor, *, num_patches: int) -> Tensor:
    """Cuts a map into one window per low-resolution patch.

    Args:
        maps_NCYX: [N, C, S, S]; fastest in channels-last order.
        num_patches: Patches P = g x g of the low-resolution picture; g divides S.

    Returns:
        [N, P, W, C]: patches and the W positions of each window in reading order.
    """
    side = round(num_patches**0.5)
    assert side * side == num_patches, f"{num_patches} patches are not a square"
    assert maps_NCYX.shape[-1] % side == 0, f"{maps_NCYX.shape[-1]} is not a multiple of {side}"
    num_images, channels, height, width = maps_NCYX.shape
    cut = maps_NCYX.permute(0, 2, 3, 1)
    cut = cut.reshape(num_images, side, height // side, side, width // side, channels)
    return cut.transpose(2, 3).reshape(num_images, num_patches, -1, channels)


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
        query = self.query(low_NPC)
        kind = query.device.type
        with torch.autocast(kind, enabled=False):
            key, _ = _absorbed(self.key)
            asked_NPC = F.linear(query, key.t().to(query.dtype))
            found_NPC = _attend(asked_NPC, maps_NCYX, scale=query.shape[-1] ** -0.5)
            value, offset = _absorbed(self.value)
            out = F.linear(found_NPC, value.to(query.dtype), offset.to(query.dtype))
            # Their gradients are zero, not missing.
            norm, linear = _parts(self.key)
            without_effect = norm.bias.sum() + linear.bias.sum()
            return out + (without_effect * 0.0).to(out.dtype)


def _absorbed(projection: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of a norm's gain and bias and a linear layer in one, in fp32."""
    norm, linear = _parts(projection)
    weight = _wide(linear.weight)
    # As a sum: a matrix library's product with one vector depends on where the weights lie.
    offset = (weight * _wide(norm.bias)).sum(1) + _wide(linear.bias)
    return weight * _wide(norm.weight), offset


def _parts(projection: nn.Sequential) -> tuple[nn.LayerNorm, nn.Linear]:
    norm, linear = projection
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    return norm, linear


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(query_NPC: Tensor, maps_NCYX: Tensor, *, scale: float) -> Tensor:
    """Returns the sums over each patch's window of normalised positions, weighted by a softmax."""
    found: Tensor
    if has_triton(maps_NCYX.device) and not maps_NCYX.requires_grad:
        maps_NCYX = maps_NCYX.contiguous(memory_format=torch.channels_last)
        found = _FusedAttention.apply(query_NPC, maps_NCYX, scale)  # type: ignore[no-untyped-call]
        return found
    window_NPWC = windows(maps_NCYX, num_patches=query_NPC.shape[1])
    # Once for keys and values. The sums are fp32 in any format; autocast would also make the map
    # an fp32 tensor twice over.
    normed_NPWC = F.layer_norm(window_NPWC, window_NPWC.shape[-1:], eps=_NORM_EPS)
    normed_NPWC = normed_NPWC.to(query_NPC.dtype)
    found = _WindowAttention.apply(query_NPC, normed_NPWC, scale)  # type: ignore[no-untyped-call]
    return found


class _FusedAttention(torch.autograd.Function):
    """The same over a map that needs no gradient, read where it lies."""

    @staticmethod
    def forward(ctx: Any, query_NPC: Tensor, maps_NCYX: Tensor, scale: float) -> Tensor:
        from vistune.models.mgm.triton_ops import attend_windows

        found_NPC, sums = attend_windows(query_NPC, maps_NCYX, scale=scale, eps=_NORM_EPS)
        ctx.save_for_backward(maps_NCYX, *sums)
        ctx.scale = scale
        return found_NPC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NPC: Tensor) -> tuple[Tensor, None, None]:
        from vistune.models.mgm.triton_ops import WindowSums, attend_windows_backward

        maps_NCYX, *sums = ctx.saved_tensors
        scale = ctx.scale
        return (
            attend_windows_backward(grad_NPC, maps_NCYX, WindowSums(*sums), scale=scale),
            None,
            None,
        )


class _WindowAttention(torch.autograd.Function):
    """Softmax over each window of the products with its query, and the sum weighted by it.

    Products with queries, the softmax and its gradient are fp32: their differences decide.
    """

    @staticmethod
    def forward(ctx: Any, query_NPC: Tensor, window_NPWC: Tensor, scale: float) -> Tensor:
        scores_NPW = _dots(window_NPWC, query_NPC) * scale
        weights_NPW = scores_NPW.softmax(-1)
        ctx.save_for_backward(query_NPC, window_NPWC, weights_NPW)
        ctx.scale = scale
        return _weighted(weights_NPW, window_NPWC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NPC: Tensor) -> tuple[Tensor, Tensor | None, None]:
        query_NPC, window_NPWC, weights_NPW = ctx.saved_tensors
        slopes_NPW = _dots(window_NPWC, grad_NPC)
        slopes_NPW -= (weights_NPW * slopes_NPW).sum(-1, keepdim=True)
        slopes_NPW *= weights_NPW * ctx.scale
        grad_window = None
        if ctx.needs_input_grad[1]:
            factors = torch.stack((slopes_NPW, weights_NPW), dim=-1).to(window_NPWC.dtype)
            grad_window = factors @ torch.stack((query_NPC, grad_NPC), dim=-2)
        return _weighted(slopes_NPW, window_NPWC), grad_window, None


def _dots(window_NPWC: Tensor, vector_NPC: Tensor) -> Tensor:
    """Returns the product of every position with its window's vector, summed and given in fp32."""
    window, vector = window_NPWC.flatten(0, 1), vector_NPC.flatten(0, 1)[..., None]
    if window.dtype not in (torch.bfloat16, torch.float16):
        found = torch.bmm(window, vector)
    elif window.is_cuda:
        found = torch.bmm(window, vector, out_dtype=torch.float32)
    else:
        # Elsewhere a product has its factors' format; one image at a time is made wide.
        parts = zip(window_NPWC, vector_NPC, strict=True)
        found = torch.cat([torch.bmm(w.float(), v.float()[..., None]) for w, v in parts])
    return found.view(window_NPWC.shape[:-1])


def _weighted(weights_NPW: Tensor, window_NPWC: Tensor) -> Tensor:
    """Returns the sum of a window's positions by weight, in the window's format."""
    weights = weights_NPW.to(window_NPWC.dtype).flatten(0, 1)[:, None]
    found = torch.bmm(weights, window_NPWC.flatten(0, 1))
    return found.view(*window_NPWC.shape[:2], -1)


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

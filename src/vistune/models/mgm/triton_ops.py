"""What a frozen high-resolution tower costs beside matrix products, as Triton kernels.

All channels last: the depthwise convolution of a block with the norm behind it and the joined map,
forward only, and the mining's reading of that map, both ways. Sums are float32; what is stored
rounds where torch's own operations round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_of(x, y, across, cols, height, width, C: tl.constexpr):
    inside = (across >= 0) & (across < width) & (y >= 0) & (y < height)
    at = x + (y * width + across)[:, None] * C + cols[None, :]
    return tl.load(at, mask=inside[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_normed(
    total, bias, gain, offset, out, y, across, cols, height, width, eps, C: tl.constexpr
):
    # Rounded first, as the convolution's result is.
    v = (total + bias[None, :]).to(out.dtype.element_ty).to(tl.float32)
    v = tl.where((cols < C)[None, :], v, 0.0)
    v = tl.where((cols < C)[None, :], v - (tl.sum(v, axis=1) / C)[:, None], 0.0)
    v = v / tl.sqrt(tl.sum(v * v, axis=1) / C + eps)[:, None]
    inside = (across < width) & (y < height)
    at = out + (y * width + across)[:, None] * C + cols[None, :]
    mask = inside[:, None] & (cols < C)[None, :]
    tl.store(at, v * gain[None, :] + offset[None, :], mask=mask)


@triton.jit
def _depthwise_norm_kernel(
    x, weight, bias, gain, offset, out, height, width, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Four rows of TILE positions with all channels: a position read serves up to four results.
    image = tl.program_id(2).to(tl.int64) * height * width * C
    x += image
    out += image
    y = tl.program_id(1) * 4 + tl.zeros([TILE], dtype=tl.int32)
    left = tl.program_id(0) * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, BLOCK)
    known = cols < C
    a = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    b = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    c = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    d = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for column in range(7):
        across = left + column - 3
        w = weight + column * C + cols
        w0 = tl.load(w, mask=known, other=0.0).to(tl.float32)[None, :]
        w1 = tl.load(w + 7 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(w + 14 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        w3 = tl.load(w + 21 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        w4 = tl.load(w + 28 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        w5 = tl.load(w + 35 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        w6 = tl.load(w + 42 * C, mask=known, other=0.0).to(tl.float32)[None, :]
        v = _row_of(x, y - 3, across, cols, height, width, C)
        a += v * w0
        v = _row_of(x, y - 2, across, cols, height, width, C)
        a += v * w1
        b += v * w0
        v = _row_of(x, y - 1, across, cols, height, width, C)
        a += v * w2
        b += v * w1
        c += v * w0
        v = _row_of(x, y, across, cols, height, width, C)
        a += v * w3
        b += v * w2
        c += v * w1
        d += v * w0
        v = _row_of(x, y + 1, across, cols, height, width, C)
        a += v * w4
        b += v * w3
        c += v * w2
        d += v * w1
        v = _row_of(x, y + 2, across, cols, height, width, C)
        a += v * w5
        b += v * w4
        c += v * w3
        d += v * w2
        v = _row_of(x, y + 3, across, cols, height, width, C)
        a += v * w6
        b += v * w5
        c += v * w4
        d += v * w3
        v = _row_of(x, y + 4, across, cols, height, width, C)
        b += v * w6
        c += v * w5
        d += v * w4
        v = _row_of(x, y + 5, across, cols, height, width, C)
        c += v * w6
        d += v * w5
        v = _row_of(x, y + 6, across, cols, height, width, C)
        d += v * w6
    bias_C = tl.load(bias + cols, mask=known, other=0.0).to(tl.float32)
    gain_C = tl.load(gain + cols, mask=known, other=0.0).to(tl.float32)
    offset_C = tl.load(offset + cols, mask=known, other=0.0).to(tl.float32)
    _store_normed(a, bias_C, gain_C, offset_C, out, y, left, cols, height, width, eps, C)
    _store_normed(b, bias_C, gain_C, offset_C, out, y + 1, left, cols, height, width, eps, C)
    _store_normed(c, bias_C, gain_C, offset_C, out, y + 2, left, cols, height, width, eps, C)
    _store_normed(d, bias_C, gain_C, offset_C, out, y + 3, left, cols, height, width, eps, C)


@triton.jit
def _source(place, size, size_from):
    # The neighbours of a position halfway between samples, and the share of the second.
    at = (place.to(tl.float32) + 0.5) * (size_from / size) - 0.5
    at = tl.maximum(at, 0.0)
    first = at.to(tl.int32)
    second = tl.minimum(first + 1, size_from - 1)
    return first, second, at - first.to(tl.float32)


@triton.jit
def _enlarge_kernel(
    x, out, height, width, height_from, width_from, stride,
    C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # TILE positions of a row, a block of channels.
    image = tl.program_id(2).to(tl.int64)
    num_tiles = tl.cdiv(width, TILE)
    y = tl.program_id(0) // num_tiles
    across = (tl.program_id(0) % num_tiles) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (across < width)[:, None] & (cols < C)[None, :]
    up, down, of_down = _source(y, height, height_from)
    left, right, of_right = _source(across, width, width_from)
    right_share = of_right[:, None]
    of_image = x + image * height_from * width_from * C + cols[None, :]
    above = of_image + up * width_from * C
    below = of_image + down * width_from * C
    a = tl.load(above + left[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(above + right[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(below + left[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(below + right[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    high = (1.0 - right_share) * a + right_share * b
    low = (1.0 - right_share) * c + right_share * d
    v = (1.0 - of_down) * high + of_down * low
    to = out + (image * height * width + y * width + across[:, None]) * stride + cols[None, :]
    tl.store(to, v, mask=mask)


@triton.jit
def _window_kernel(
    maps, vector, weights, mean, rstd, out, side, window_x, scale, eps,
    C: tl.constexpr, NUM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    # One window: its products with a vector, what becomes of them, the sum that they weigh. The
    # window is read twice; positions are normalised on the way.
    patch = tl.program_id(0)
    image = patch // (side * side)
    y, x = (patch // side) % side, patch % side
    place = tl.arange(0, BLOCK_W)
    inside = place < NUM
    down = y * (NUM // window_x) + place // window_x
    across = x * window_x + place % window_x
    window = maps + image.to(tl.int64) * side * side * NUM * C
    window = window + (down * side * window_x + across)[:, None] * C
    vector += patch.to(tl.int64) * C
    out += patch.to(tl.int64) * C
    kept = patch * NUM + place
    cols = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK_W, BLOCK], dtype=tl.float32)
    if BACKWARD:
        middle = tl.load(mean + kept, mask=inside, other=0.0)
        slope = tl.load(rstd + kept, mask=inside, other=0.0)
        share = tl.load(weights + kept, mask=inside, other=0.0)
        for start in range(0, C, BLOCK):
            known = start + cols < C
            mask = inside[:, None] & known[None, :]
            v = tl.load(window + start + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            u = tl.load(vector + start + cols, mask=known, other=0.0).to(tl.float32)
            dots += (v - middle[:, None]) * u[None, :]
        change = tl.sum(dots, axis=1) * slope
        change = share * (change - tl.sum(share * change, axis=0)) * scale
    else:
        # Near enough to the mean for the variance to be summed in the same pass.
        mask = inside[:, None] & (cols < C)[None, :]
        v = tl.load(window + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        near = tl.sum(v, axis=1) / tl.sum((cols < C).to(tl.float32), axis=0)
        sums = tl.zeros([BLOCK_W, BLOCK], dtype=tl.float32)
        squares = tl.zeros([BLOCK_W, BLOCK], dtype=tl.float32)
        totals = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            known = start + cols < C
            mask = inside[:, None] & known[None, :]
            v = tl.load(window + start + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            u = tl.load(vector + start + cols, mask=known, other=0.0).to(tl.float32)
            v = tl.where(mask, v - near[:, None], 0.0)
            sums += v
            squares += v * v
            dots += v * u[None, :]
            totals += u
        far = tl.sum(sums, axis=1) / C
        slope = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / C - far * far + eps)
        middle = near + far
        scores = (tl.sum(dots, axis=1) - far * tl.sum(totals, axis=0)) * slope * scale
        scores = tl.where(inside, scores, float("-inf"))
        change = tl.exp(scores - tl.max(scores, axis=0))
        change = change / tl.sum(change, axis=0)
        tl.store(mean + kept, middle, mask=inside)
        tl.store(rstd + kept, slope, mask=inside)
        tl.store(weights + kept, change, mask=inside)
    change = change * slope
    for start in range(0, C, BLOCK):
        known = start + cols < C
        mask = inside[:, None] & known[None, :]
        v = tl.load(window + start + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum((v - middle[:, None]) * change[:, None], axis=0)
        tl.store(out + start + cols, total, mask=known)


def depthwise_norm(
    maps_NCYX: Tensor,
    weight: Tensor,
    bias_C: Tensor,
    gain_C: Tensor,
    offset_C: Tensor,
    *,
    eps: float,
) -> Tensor:
    """A depthwise 7 x 7 convolution, padded with zeros, and a norm over the channels.

    Args:
        maps_NCYX: [N, C, Y, X]; copied unless it is channels last.
        weight: [C, 1, 7, 7].
        bias_C: Of the convolution.
        gain_C: Of the norm.
        offset_C: Of the norm.
        eps: Of the norm.

    Returns:
        [N, C, Y, X], channels last.
    """
    num_images, channels, height, width = maps_NCYX.shape
    maps_NCYX = maps_NCYX.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(maps_NCYX)
    block = triton.next_power_of_2(channels)
    # The fastest of a few on an H200: what a program holds has to fit its registers.
    tile, warps = 8 if block <= 512 else 2, 4 if block <= 1024 else 8
    grid = (triton.cdiv(width, tile), triton.cdiv(height, 4), num_images)
    _depthwise_norm_kernel[grid](
        maps_NCYX, weight.flatten(1).t().contiguous(), bias_C, gain_C, offset_C, out,
        height, width, eps, C=channels, BLOCK=block, TILE=tile, num_warps=warps,
    )  # fmt: skip
    return out


def joined_map(stages: Sequence[Tensor]) -> Tensor:
    """See `convnext.joined_map`; stages are copied unless they are channels last."""
    num_images, first, height, width = stages[0].shape
    total = sum(maps.shape[1] for maps in stages)
    out = torch.empty(
        (num_images, total, height, width),
        dtype=stages[0].dtype, device=stages[0].device, memory_format=torch.channels_last,
    )  # fmt: skip
    out[:, :first].copy_(stages[0])
    for maps in stages[1:]:
        maps = maps.contiguous(memory_format=torch.channels_last)
        _, channels, height_from, width_from = maps.shape
        block, tile = 128, 16
        grid = (height * triton.cdiv(width, tile), triton.cdiv(channels, block), num_images)
        _enlarge_kernel[grid](
            maps, out[:, first:], height, width, height_from, width_from, total,
            C=channels, BLOCK=block, TILE=tile, num_warps=4,
        )  # fmt: skip
        first += channels
    return out


class WindowSums(NamedTuple):
    """What attention over windows keeps for its backward pass: float32 [N, P, W] each."""

    weights: Tensor
    mean: Tensor
    rstd: Tensor


def attend_windows(
    query_NPC: Tensor, maps_NCYX: Tensor, *, scale: float, eps: float
) -> tuple[Tensor, WindowSums]:
    """Attention of each patch over its window of a map, normalised over the channels on the way.

    Args:
        query_NPC: One query for each of P = g x g patches.
        maps_NCYX: Channels last; g divides its sides.
        scale: Of the products.
        eps: Of the norm.

    Returns:
        The sums of normalised positions [N, P, C], and what `attend_windows_backward` needs.
    """
    num_images, num_patches, _ = query_NPC.shape
    num = maps_NCYX.shape[2] * maps_NCYX.shape[3] // num_patches
    kept = torch.empty(
        (3, num_images, num_patches, num), dtype=torch.float32, device=query_NPC.device
    )
    sums = WindowSums(*kept)
    return _window(query_NPC, maps_NCYX, sums, scale=scale, eps=eps, backward=False), sums


def attend_windows_backward(
    grad_NPC: Tensor, maps_NCYX: Tensor, sums: WindowSums, *, scale: float
) -> Tensor:
    """Returns the gradient of the queries; see `attend_windows`."""
    return _window(grad_NPC, maps_NCYX, sums, scale=scale, eps=0.0, backward=True)


def _window(
    vector_NPC: Tensor,
    maps_NCYX: Tensor,
    sums: WindowSums,
    *,
    scale: float,
    eps: float,
    backward: bool,
) -> Tensor:
    num_images, num_patches, channels = vector_NPC.shape
    side = math.isqrt(num_patches)
    num = sums.weights.shape[-1]
    vector_NPC = vector_NPC.contiguous()
    out = torch.empty_like(vector_NPC)
    _window_kernel[(num_images * num_patches,)](
        maps_NCYX, vector_NPC, *sums, out, side, maps_NCYX.shape[3] // side, scale, eps,
        C=channels, NUM=num, BLOCK_W=triton.next_power_of_2(num), BLOCK=64, BACKWARD=backward,
        num_warps=4,
    )  # fmt: skip
    return out

"""MGM's Triton kernels against torch: on a GPU, or anywhere in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/models/test_mgm_triton_ops.py -m ""
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models.mgm.convnext import ConvNeXtStages, joined_map
from vistune.models.mgm.mining import PatchInfoMining

pytest.importorskip("triton", reason="needs Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# The same float32 sums in another order; bf16 results that round to a neighbour are rare. The
# interpreter cuts bf16 off instead of rounding it.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if INTERPRETED else 2e-3}
LAST = torch.channels_last


@pytest.fixture
def ops():
    from vistune.models.mgm import triton_ops

    return triton_ops


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = (found.float() - expected.float()).norm()
    assert difference <= tolerance * expected.float().norm()


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 6, 10), (1, 16, 9, 5), (1, 48, 4, 4), (1, 192, 8, 8)])
def test_depthwise_convolution_and_norm(ops, shape, dtype):
    channels = shape[1]
    maps = draw(*shape, dtype=dtype).contiguous(memory_format=LAST)
    weight = draw(channels, 1, 7, 7, seed=1, dtype=dtype)
    bias, gain, offset = (draw(channels, seed=n, dtype=dtype) for n in (2, 3, 4))
    found = ops.depthwise_norm(maps, weight, bias, gain, offset, eps=1e-6)
    wide = F.conv2d(maps.double(), weight.double(), bias.double(), padding=3, groups=channels)
    rounded = wide.to(dtype).float().permute(0, 2, 3, 1)
    expected = F.layer_norm(rounded, (channels,), gain.float(), offset.float(), 1e-6)
    assert found.is_contiguous(memory_format=LAST) and found.dtype == dtype
    close(found.permute(0, 2, 3, 1), expected, CLOSE[dtype])
    # A map in another order is read as well.
    again = ops.depthwise_norm(maps.contiguous(), weight, bias, gain, offset, eps=1e-6)
    assert torch.equal(again, found)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_the_joined_map(ops, dtype):
    sizes = ((24, 16, 24), (40, 8, 12), (136, 4, 6), (16, 1, 1))
    stages = [draw(2, *size, dtype=dtype).contiguous(memory_format=LAST) for size in sizes]
    found = ops.joined_map(stages)
    with torch.enable_grad():  # torch's own way
        expected = joined_map(stages)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=LAST)
    close(found, expected, CLOSE[dtype])


@pytest.mark.parametrize("num", [(40, 3, 4), (200, 2, 3), (64, 2, 1)])
def test_attention_over_windows_both_ways(ops, num):
    """Against the products written out, in float64."""
    channels, side, window = num
    maps = draw(2, channels, side * window, side * window) * 2 + 3
    maps = maps.contiguous(memory_format=LAST)
    query, upstream = (draw(2, side * side, channels, seed=n) for n in (1, 2))
    found, sums = ops.attend_windows(query, maps, scale=0.3, eps=1e-5)
    gradient = ops.attend_windows_backward(upstream, maps, sums, scale=0.3)
    cut = maps.double().unfold(2, window, window).unfold(3, window, window)
    cut = cut.permute(0, 2, 3, 4, 5, 1).reshape(2, side * side, window * window, channels)
    normed = F.layer_norm(cut, (channels,), eps=1e-5)
    leaf = query.double().requires_grad_()
    weights = (torch.einsum("npwc,npc->npw", normed, leaf) * 0.3).softmax(-1)
    expected = torch.einsum("npw,npwc->npc", weights, normed)
    expected.backward(upstream.double())
    close(sums.weights, weights, 1e-5)
    close(found, expected, 1e-5)
    if window == 1:
        assert leaf.grad.abs().max() < 1e-9 and gradient.abs().max() < 1e-4
    else:
        close(gradient, leaf.grad, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="chosen on CUDA alone")
def test_tower_and_mining_take_the_kernels_where_nothing_before_them_trains():
    torch.manual_seed(0)
    tower = ConvNeXtStages([32, 64], [1, 2]).to(DEVICE).requires_grad_(False)
    mining = PatchInfoMining(16, 96).to(DEVICE)
    pixels, low = draw(2, 3, 64, 64), draw(2, 16, 16, seed=1)
    with torch.no_grad():
        maps = joined_map(tower(pixels))
    with torch.enable_grad():
        expected = joined_map(tower(pixels))
    close(maps, expected, 1e-5)
    results = []
    for given in (maps, maps.clone().requires_grad_()):
        out = mining(low, given)
        gradients = torch.autograd.grad(out.square().sum(), list(mining.parameters()))
        results.append((out, *gradients))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 1e-4)

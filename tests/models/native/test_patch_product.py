"""Projections of patches as products: the same numbers, weights and names as the convolution."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import KINDS, write_native

from vistune.assembly import load_assembled
from vistune.models.native.patch_product import (
    PatchProduct,
    is_patch_projection,
    multiply_patches,
)

PATCH = (2, 6, 6)


def projection(*, bias: bool = True, stride: tuple[int, int, int] = PATCH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 10, PATCH, stride=stride, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_convolutions(bias: bool) -> None:
    model, patches = projection(bias=bias), torch.randn(7, 3, *PATCH, requires_grad=True)

    def run() -> list[torch.Tensor]:
        out = model(patches)
        return [out, *torch.autograd.grad(out.square().sum(), [patches, *model.parameters()])]

    parameters, expected = dict(model.named_parameters()), run()
    multiply_patches(model)
    found = run()
    assert isinstance(model[0], PatchProduct)
    assert all(p is parameters[n] for n, p in model.named_parameters()) and len(parameters) > bias
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        # fp32 sums of 216 products, in another order.
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_larger_inputs_are_convolved() -> None:
    model, video = projection(), torch.randn(2, 3, 4, 12, 18)
    expected = model(video)
    multiply_patches(model)
    assert torch.equal(model(video), expected)


def test_patches_that_overlap_stay_a_convolution() -> None:
    model = projection(stride=(1, 6, 6))
    multiply_patches(model)
    assert type(model[0]) is nn.Conv3d


def test_no_convolution_of_the_forward_pass_is_left(tmp_path: Path) -> None:
    projected = set()
    for kind in sorted(KINDS):
        model = load_assembled(write_native(kind, tmp_path / kind)).model
        assert not any(is_patch_projection(m) for m in model.modules()), kind
        if any(isinstance(m, PatchProduct) for m in model.modules()):
            projected.add(kind)
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"} <= projected

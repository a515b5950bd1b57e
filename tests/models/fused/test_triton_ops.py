"""The Triton kernels compute what the torch reference computes, to the last bits of bf16."""

import pytest
import torch

from vistune.models.fused import torch_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, WIDTH = 300, 4096 + 64
# bf16 keeps 8 bits: values that round differently are rare, and then off by 2^-8 of themselves.
BF16, FP8 = 2e-3, 4e-3


@pytest.fixture
def ops():
    from vistune.models.fused import triton_ops

    return triton_ops


def draw(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def some_channels(width):
    generator = torch.Generator("cuda").manual_seed(7)
    drawn = torch.randperm(width, generator=generator, device="cuda")[:64]
    return drawn.sort().values.to(torch.int32)


def close(found, expected, tolerance):
    difference = (found.float() - expected.float()).norm()
    assert difference <= tolerance * expected.float().norm()


def same_operand(found, expected):
    for name in ("plain", "fp8"):
        assert (getattr(found, name) is None) == (getattr(expected, name) is None)
    if expected.plain is not None:
        close(found.plain, expected.plain, BF16)
    if expected.fp8 is not None:
        same_fp8((found.fp8, found.scale), (expected.fp8, expected.scale), expected.plain)


def same_fp8(found, expected, plain):
    """Also compares sums of what is held twice, which a rounding the other way leaves alone."""
    (values, scale), (values_expected, scale_expected) = found, expected
    width = values.shape[1] if plain is None else plain.shape[1]
    assert values.shape == values_expected.shape
    close(
        values[:, :width].float() * scale, values_expected[:, :width].float() * scale_expected, FP8
    )
    if width == values.shape[1]:
        return
    sums = []
    for part, scales in ((values, scale), (values_expected, scale_expected)):
        low, high = part[:, width:].float().chunk(2, dim=1)
        assert low.norm() > 0.01 * high.norm()
        sums.append((low + high) * scales)
    close(*sums, BF16)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_both_ways(ops, unit_offset):
    x, weight = draw(ROWS, WIDTH), 1 + 0.1 * draw(WIDTH, seed=1)
    grad, residual = draw(ROWS, WIDTH, seed=2), draw(ROWS, WIDTH, seed=3)
    norm = {"eps": 1e-5, "unit_offset": unit_offset}
    twice = {"quantize": True, "channels_C": some_channels(WIDTH)}
    for forms in ({}, {"quantize": True}, twice, {"quantize": True, "keep": False}):
        found, rstd = ops.rms_norm(x, weight, **norm, **forms)
        expected, rstd_expected = torch_ops.rms_norm(x, weight, **norm, **forms)
        same_operand(found, expected)
        close(rstd, rstd_expected, 1e-6)
    for again, of_weight in ((False, False), (True, False), (True, True)):
        back = {"unit_offset": unit_offset, "again": again, "weight_gradient": of_weight}
        for beside in (residual, None):
            found = ops.rms_norm_backward(grad, x, rstd, weight, beside, **back)
            expected = torch_ops.rms_norm_backward(grad, x, rstd, weight, beside, **back)
            close(found[0], expected[0], BF16)
            assert (found[1] is None) == (not again) and (found[2] is None) == (not of_weight)
            if again:
                close(found[1], expected[1], BF16)
            if of_weight:
                close(found[2], expected[2], 1e-5)  # fp32 sums over the rows in another order


@pytest.mark.parametrize("width", [128, 80])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms_of_heads_both_ways(ops, unit_offset, width):
    for heads, kv_heads in ((20, 4), (0, 3), (5, 0)):
        states = draw(ROWS, heads + 2 * kv_heads, width)
        grad = draw(ROWS, heads + 2 * kv_heads, width, seed=1)
        weights = [(1 + 0.1 * draw(width, seed=n)).float() for n in (2, 3)]
        norm = {"num_heads": heads, "num_kv_heads": kv_heads, "eps": 1e-6}
        norm["unit_offset"] = unit_offset
        expected = torch_ops.head_norm(states, *weights, **norm)
        close(ops.head_norm(states, *weights, **norm), expected, BF16)
        for of_weight in (False, True):
            ours, theirs = grad.clone(), grad.clone()
            norm["weight_gradient"] = of_weight
            found = ops.head_norm_backward_(ours, states, *weights, **norm)
            wanted = torch_ops.head_norm_backward_(theirs, states, *weights, **norm)
            close(ours, theirs, BF16)
            assert (found is None) == (not of_weight)
            for a, b in zip(found or (), wanted or (), strict=True):
                assert (a - b).norm() <= 1e-4 * b.norm()
        del norm["weight_gradient"]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("quantize", [False, True])
def test_the_gated_unit_both_ways(ops, activation, quantize):
    gate_up, grad = draw(ROWS, 2 * WIDTH), draw(ROWS, WIDTH, seed=1)
    forward = {"activation": activation, "quantize": quantize}
    same_operand(ops.glu(gate_up, **forward), torch_ops.glu(gate_up, **forward))
    if quantize:
        forward["channels_C"] = some_channels(WIDTH)
        same_operand(ops.glu(gate_up, **forward), torch_ops.glu(gate_up, **forward))
    scale = torch.rand(2 * WIDTH, device="cuda") if quantize else None
    back = {"activation": activation, "column_scale_F": scale, "again": True}
    found, output = ops.glu_backward_(grad, gate_up.clone(), **back)
    expected, output_expected = torch_ops.glu_backward_(grad, gate_up.clone(), **back)
    same_operand(found, expected)
    close(output, output_expected, BF16)


@pytest.mark.parametrize("width", [128, 80, 24])
def test_rotary_positions_there_and_back(ops, width):
    states = draw(ROWS, 12, width)
    angles = 100 * torch.rand(ROWS, width // 2, device="cuda")
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    turned, expected = states.clone(), states.clone().float()
    ops.rotate_(turned, cos, sin, num_heads=9, inverse=False)
    torch_ops.rotate_(expected, cos, sin, num_heads=9, inverse=False)
    close(turned, expected, BF16)
    assert torch.equal(turned[:, 9:], states[:, 9:])
    ops.rotate_(turned, cos, sin, num_heads=9, inverse=True)
    close(turned, states, 2 * BF16)  # rounded twice
    q, k, v = states.split([6, 3, 3], dim=1)
    joined = ops.join_rotated(q, k, v, cos, sin)
    close(joined, torch_ops.join_rotated(q.float(), k.float(), v.float(), cos, sin), BF16)


@pytest.mark.parametrize("width", [128, 80, 24])
def test_keys_get_their_bias_as_they_are_turned(ops, width):
    states, bias = draw(ROWS, 12, width), 300 * draw(3, width, seed=1)
    angles = 1e-3 * torch.rand(ROWS, width // 2, device="cuda")
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    turned, expected = states.clone(), states.clone().float()
    for one, kernels in ((turned, ops), (expected, torch_ops)):
        kernels.rotate_(one, cos, sin, num_heads=9, inverse=False, key_bias_HK=bias)
    close(turned, expected, BF16)
    # Without the quick half's bias nothing large is left to hide an error behind.
    slow = torch.arange(width, device="cuda") % (width // 2) >= width // 4
    close(turned[..., slow], expected[..., slow], BF16)
    assert torch.equal(turned[:, 9:], states[:, 9:])


def test_rows_in_fp8(ops):
    x, scale = draw(ROWS, WIDTH), torch.rand(WIDTH, device="cuda")
    for forms in ({}, {"column_scale_D": scale}, {"channels_C": some_channels(WIDTH)}):
        same_fp8(ops.quantize_rows(x, **forms), torch_ops.quantize_rows(x, **forms), x)

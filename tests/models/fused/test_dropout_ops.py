"""Masks made from seeds: in torch, and in Triton on a GPU or in its interpreter.

TRITON_INTERPRET=1 python -m pytest tests/models/fused/test_dropout_ops.py -m ""
"""

import os

import pytest
import torch

from vistune.models.fused import torch_ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
RUNS_TRITON = torch.cuda.is_available() or INTERPRETED
# Not a multiple of a program's four blocks, whose last is cut.
ROWS, WIDTH = (24 if INTERPRETED else 300), 2500


@pytest.fixture(
    params=[
        "torch",
        pytest.param(
            "triton",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not RUNS_TRITON, reason="needs a CUDA device"),
            ],
        ),
    ]
)
def ops(request):
    if request.param == "torch":
        return torch_ops
    pytest.importorskip("triton", reason="needs Triton")
    from vistune.models.fused import triton_ops

    return triton_ops


def ones(ops, rows=ROWS, width=WIDTH, dtype=torch.float32):
    on_gpu = ops is not torch_ops and not INTERPRETED
    return torch.ones(rows, width, device="cuda" if on_gpu else "cpu", dtype=dtype)


def kept(ops, *, p=0.3, seed=5, **shape):
    return ops.dropout(ones(ops, **shape), p=p, seed=seed) != 0


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_and_the_scale(ops, p):
    mask = ops.dropout(ones(ops), p=p, seed=2**61 + 1)
    assert torch.equal(mask.unique(), torch.tensor([0, 1 / (1 - p)], device=mask.device))
    count, share = mask.numel(), float((mask == 0).double().mean())
    # Five standard deviations everywhere: of all draws, of each row and column, and of how much
    # rows and columns spread.
    assert abs(share - p) <= 5 * (p * (1 - p) / count) ** 0.5
    for dim in (0, 1):
        shares, expected = (mask == 0).double().mean(dim), p * (1 - p) / mask.shape[dim]
        assert (shares - p).abs().max() <= 5 * expected**0.5
        assert abs(float(shares.var()) / expected - 1) <= 5 * (2 / len(shares)) ** 0.5


def test_all_or_nothing(ops):
    assert kept(ops, p=0.0).all() and not kept(ops, p=1.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_drops_the_same_in_every_form(ops, dtype):
    like = ones(ops, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    x, add = (torch.randn(ROWS, WIDTH, generator=draw).to(like) for _ in range(2))
    drop = {"p": 0.3, "seed": 2**40 + 3}
    mask = ops.dropout(like.float(), **drop)
    dropped = ops.dropout(x, **drop)
    # The interpreter cuts bf16 off instead of rounding it.
    close = {"rtol": 2**-7 if dtype is torch.bfloat16 else 1e-6, "atol": 1e-6}
    assert dropped.dtype is dtype and torch.equal(dropped != 0, mask != 0)
    torch.testing.assert_close(dropped.float(), x.float() * mask, **close)
    inside, beside = x.clone(), x.clone()
    assert ops.dropout_(inside, **drop) is None and torch.equal(inside, dropped)
    ops.dropout_(beside, **drop, add_TD=add)
    torch.testing.assert_close(beside.float(), x.float() * mask + add.float(), **close)
    wide = torch.cat([x, add], dim=1)
    assert torch.equal(ops.dropout(wide[:, :WIDTH], **drop), dropped)
    ops.dropout_(wide[:, WIDTH:], **drop, add_TD=wide[:, :WIDTH])
    assert torch.equal(wide[:, :WIDTH], x)
    torch.testing.assert_close(wide[:, WIDTH:].float(), add.float() * mask + x.float(), **close)


def test_rows_columns_and_seeds_have_nothing_in_common(ops):
    mask = kept(ops)
    # torch's CPU generator takes 32 bits of a seed.
    seeds = (6,) if ops is torch_ops else (6, 5 + 2**32, 5 + 2**61)
    pairs = [(mask, kept(ops, seed=seed)) for seed in seeds]
    pairs += [(mask[:-n], mask[n:]) for n in (1, 2, 4, 64, 256) if n < ROWS]
    pairs += [(mask[:, :-n], mask[:, n:]) for n in (1, 2, 4, 256, 512, 1024, 2048)]
    for one, other in pairs:
        count = one.numel()
        agree = float((one == other).double().mean())
        expected = 0.7**2 + 0.3**2
        assert abs(agree - expected) <= 5 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_places_beyond_32_bits():
    from vistune.models.fused import triton_ops

    rows, width = 2**19 + 8, 4096 + 8  # 2^31 numbers and some
    x = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16)
    triton_ops.dropout_(x, p=0.5, seed=3)
    first, last = (x[part] != 0 for part in (slice(64), slice(-64, None)))
    for mask in (first, last):
        assert abs(float(mask.double().mean()) - 0.5) <= 5 * 0.5 / mask.numel() ** 0.5
    assert abs(float((first == last).double().mean()) - 0.5) <= 5 * 0.5 / first.numel() ** 0.5
    few = torch.ones(64, width, device="cuda", dtype=torch.bfloat16)
    triton_ops.dropout_(few, p=0.5, seed=3)
    assert torch.equal(few, x[:64])
    del x, few, first, last, mask
    torch.cuda.empty_cache()  # or 4 GiB stay with whatever small tensor is put there next

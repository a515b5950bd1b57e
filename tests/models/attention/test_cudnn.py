"""cuDNN's kernels for ragged rows give what torch's varlen kernel gives; needs a Hopper GPU."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from vistune.errors import MissingExtraError
from vistune.models.attention import Packing, Scoring
from vistune.models.attention.cudnn import Cudnn
from vistune.models.attention.varlen import Varlen

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs cudnn-frontend"),
]
LENGTHS = [70, 1, 601, 333, 128]


def row(lengths: list[int]) -> Packing:
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return Packing(edges, max(lengths))


def drawn(num_tokens: int, heads: int, kv_heads: int, width: int, *, joined: bool) -> list[Tensor]:
    """Queries, keys, values as the merged projection lays them out, or apart."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (num_tokens, heads + 2 * kv_heads, width)
    both = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
    parts = both.split([heads, kv_heads, kv_heads], dim=1)
    return [(p if joined else p.contiguous()).detach().requires_grad_() for p in parts]


def both_ways(backend: Cudnn | Varlen, leaves: list[Tensor], made: Packing) -> list[Tensor]:
    out = backend.attend(*leaves, made, Scoring())
    grad = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def test_without_the_package_it_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("vistune.models.attention.cudnn.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="cudnn"):
        Cudnn()
    assert "cudnn" not in sys.modules or HOPPER


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize("joined", [True, False])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "width"), [(4, 4, 128), (8, 2, 64), (6, 1, 96), (8, 1, 256)]
    )
    def test_equals_the_varlen_kernel(
        self, heads: int, kv_heads: int, width: int, joined: bool
    ) -> None:
        backend = Cudnn()
        for lengths in (LENGTHS, LENGTHS[::-1], [3], [577] * 11):
            made = row(lengths)
            leaves = drawn(sum(lengths), heads, kv_heads, width, joined=joined)
            expected = both_ways(Varlen(), leaves, made)
            for a, b in zip(both_ways(backend, leaves, made), expected, strict=True):
                assert a.isfinite().all()
                # Both round their inner products to bf16 in places of their own.
                assert (a.float() - b.float()).norm() <= 8e-3 * b.float().norm()

    def test_no_sample_sees_another(self) -> None:
        made, backend = row(LENGTHS), Cudnn()
        query, key, value = drawn(sum(LENGTHS), 4, 2, 64, joined=False)
        before = backend.attend(query, key, value, made, Scoring())
        with torch.no_grad():
            key[70:672] += 3.0
            value[70:672] -= 3.0
        after = backend.attend(query, key, value, made, Scoring())
        assert torch.equal(before[:70], after[:70]) and torch.equal(before[672:], after[672:])
        assert not torch.equal(before[70:672], after[70:672])

    def test_gradients_that_lie_side_by_side_share_one_tensor(self) -> None:
        leaves = drawn(sum(LENGTHS), 4, 2, 64, joined=True)
        _, *grads = both_ways(Cudnn(), leaves, row(LENGTHS))
        assert len({g.untyped_storage().data_ptr() for g in grads}) == 1

    def test_windows_and_tails_go_to_the_varlen_kernel(self) -> None:
        made = row(LENGTHS)
        leaves = drawn(sum(LENGTHS), 4, 2, 64, joined=False)
        for asked, scoring in (
            (made, Scoring(window=9)),
            (Packing(made.cu_seqlens, made.max_seqlen, causal=False), Scoring()),
        ):
            found = Cudnn().attend(*leaves, asked, scoring)
            assert torch.equal(found, Varlen().attend(*leaves, asked, scoring))

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import FakeNpu, fake_flash, written_out
from tiny_parts import composed, one_by_one, packed_logits, row
from torch import Tensor

from vistune.errors import ModelError
from vistune.models.attention import (
    AUTO,
    Backend,
    Packing,
    Scoring,
    attend_packed,
    backend_of,
    register_packed_attention,
)
from vistune.models.attention.contract import RowMemo
from vistune.models.attention.flash import FlashAttention
from vistune.models.attention.flex import Flex, block_mask
from vistune.models.attention.npu import NpuFusion
from vistune.models.attention.per_sample import PerSample

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [5, 170, 1, 133]
BACKENDS: dict[str, Callable[[], Backend]] = {
    "auto": lambda: AUTO,
    "sdpa": PerSample,
    "flex": Flex,
    "npu": lambda: NpuFusion(FakeNpu()),
    "flash_attn": lambda: FlashAttention(fake_flash),
}
SCORINGS = {
    "plain": Scoring(),
    "scale": Scoring(scale=0.7),
    "window": Scoring(window=9),
    "cap": Scoring(softcap=1.5),
    "cap, window": Scoring(softcap=1.5, window=40),
}


def edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packing(kind: str, lengths: list[int] = LENGTHS) -> Packing:
    made = Packing(edges(lengths), max(lengths))
    if kind == "both ways":
        return replace(made, causal=False)
    if kind == "tail":
        ends = [min(n, k) for n, k in zip(lengths, (2, 140, 0, 7), strict=True)]
        return replace(made, cu_queries=edges(ends), max_queries=max(ends))
    return made


def tensors(made: Packing, key_heads: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    num_keys = int(made.cu_seqlens[-1])
    num_queries = num_keys if made.cu_queries is None else int(made.cu_queries[-1])
    shapes = ((num_queries, 4), (num_keys, key_heads), (num_keys, key_heads))
    return tuple(torch.randn(*s, width, generator=drawn) for s in shapes)  # type: ignore[return-value]


def supports(name: str, scoring: Scoring, made: Packing) -> bool:
    if scoring.window is not None and not made.causal:
        return False
    return not (name == "npu" and scoring.softcap is not None)


@pytest.mark.parametrize("kind", ["causal", "both ways", "tail"])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS.keys())
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_attention_written_out(name: str, scoring: Scoring, kind: str) -> None:
    made = packing(kind)
    if not supports(name, scoring, made):
        pytest.skip("not offered; the refusal is tested below")
    results = []
    for key_heads in (1, 4):
        for attend in (BACKENDS[name]().attend, written_out):
            # FlexAttention has no backward pass on a CPU; a GPU test covers it.
            leaves = [t.requires_grad_(name != "flex") for t in tensors(made, key_heads)]
            out = attend(*leaves, made, scoring)
            if name != "flex":
                out.square().sum().backward()
            results.append([out.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for found, expected in zip(results[::2], results[1::2], strict=True):
        assert len(found) == len(expected) or name == "flex"
        for a, b in zip(found, expected, strict=False):
            # fp32 sums in another order; gradients reach 50.
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_sample_sees_another(name: str) -> None:
    made = packing("causal")
    query, key, value = tensors(made, 2)
    backend = BACKENDS[name]()
    before = backend.attend(query, key, value, made, Scoring())
    start, stop = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    key[start:stop] += 3.0
    value[start:stop] -= 3.0
    after = backend.attend(query, key, value, made, Scoring())
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[stop:], after[stop:])
    assert not torch.isclose(before[start:stop], after[start:stop]).any()


def test_what_a_backend_does_not_offer_is_refused() -> None:
    query, key, value = tensors(packing("causal"), 4)
    half = value.bfloat16()
    npu, flash, flex = BACKENDS["npu"](), BACKENDS["flash_attn"](), Flex()
    assert npu.refusal(query, value, Scoring(softcap=2.0)) == "scores are capped"
    assert npu.refusal(query[..., :8], value[..., :8], Scoring()) == "heads are 8 wide"
    assert flash.refusal(query, value, Scoring()) == "numbers are torch.float32"
    assert flash.refusal(query.bfloat16(), half, Scoring(dropout=0.1)) is None
    assert flex.refusal(query, value, Scoring(dropout=0.1)) == "weights are dropped"
    assert "backward" in str(flex.refusal(query.clone().requires_grad_(), value, Scoring()))
    on_cpu = backend_of("varlen").refusal(query.bfloat16(), half, Scoring())
    assert on_cpu == "tensors are on cpu"
    arguments: dict[str, Any] = {"cu_seqlens": edges(LENGTHS), "max_seqlen": max(LENGTHS)}
    with pytest.raises(ModelError, match="'varlen' does not take") as raised:
        attend_packed(query, key, value, backend=backend_of("varlen"), **arguments)
    assert "train.attention" in str(raised.value)
    with pytest.raises(ModelError, match="looks back"):
        attend_packed(query, key, value, window=3, causal=False, **arguments)


def test_a_window_no_sample_reaches_is_none() -> None:
    fake = FakeNpu()
    arguments = {"cu_seqlens": edges(LENGTHS), "max_seqlen": max(LENGTHS)}
    for window in (max(LENGTHS), max(LENGTHS) - 1):
        attend_packed(
            *tensors(packing("causal"), 4), window=window, backend=NpuFusion(fake), **arguments
        )
    assert [call["sparse_mode"] for call in fake.calls] == [3, 4]


def test_npu_rows_of_too_many_samples_are_refused() -> None:
    lengths = [1] * 1025
    made = Packing(edges(lengths), 1)
    with pytest.raises(ModelError, match="few enough samples") as raised:
        NpuFusion(FakeNpu()).attend(*tensors(made, 4), made, Scoring())
    assert "1025" in str(raised.value) and raised.value.where == "batch.max_tokens"


def test_memo_never_confuses_rows() -> None:
    memo: RowMemo[list[int]] = RowMemo()

    def lengths(made: Packing) -> list[int]:
        return memo.get(made, make=lambda: made.cu_seqlens.diff().tolist())

    first = packing("causal")
    assert lengths(first) is lengths(replace(first)) == LENGTHS
    first.cu_seqlens[1] += 1  # changed in place: read again
    assert lengths(first)[:2] == [LENGTHS[0] + 1, LENGTHS[1] - 1]
    for length in range(3, 60):  # tensors that come and go at the same addresses
        assert lengths(Packing(edges([length, 2]), length)) == [length, 2]


def test_blocks_of_a_long_row_are_few() -> None:
    lengths = [128 * 4] * 50
    mask = block_mask(Packing(edges(lengths), 512), sum(lengths), sum(lengths), window=None)
    full, partial = mask.full_kv_num_blocks, mask.kv_num_blocks
    # Each sample of 4 x 4 blocks: 4 on the diagonal are masked, the 6 below it are whole.
    assert int(full.sum()) == 50 * 6 and int(partial.sum()) == 50 * 4


@pytest.mark.parametrize("text", ["llama", "qwen3", "mistral"])
def test_a_decoder_on_another_backend_gives_the_same(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native transformers decoder takes the backend by its registered name: loss, gradients."""
    fake = FakeNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    model, facts = composed(tmp_path, text=text)
    made = row(facts)
    # The tiny heads are 8 wide, which the operator does not take.
    monkeypatch.setattr(NpuFusion, "refusal", lambda *_: None)
    found = []
    for name in ("npu", "sdpa", None):
        if name is not None:
            registered = register_packed_attention(name)  # type: ignore[arg-type]
            model.language_model.config._attn_implementation = registered
        model.zero_grad()
        logits = one_by_one(model, made) if name is None else packed_logits(model, made)
        torch.cat(logits).log_softmax(-1)[:, 7].sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((torch.cat(logits).detach(), gradients))
    assert fake.calls and (text != "mistral" or any(c["sparse_mode"] == 4 for c in fake.calls))
    for logits_MV, gradients in found[:2]:
        torch.testing.assert_close(logits_MV, found[2][0], atol=1e-5, rtol=1e-4)
        assert gradients.keys() == found[2][1].keys()
        for name, gradient in gradients.items():
            largest = found[2][1][name].abs().max()
            assert (gradient - found[2][1][name]).abs().max() <= 1e-5 * largest.clamp(min=1.0)


# --- on a GPU ---------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["causal", "both ways", "tail"])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS.keys())
@pytest.mark.parametrize("name", ["varlen", "flex", "sdpa"])
def test_gpu_equals_attention_written_out(name: str, scoring: Scoring, kind: str) -> None:
    if name == "flex" and scoring.scale is not None:
        pytest.skip("each variant takes seconds to compile")
    if scoring.scale is not None:
        scoring = Scoring(scale=0.05)  # heads are 64 wide: 0.7 would leave bf16 few digits
    torch._dynamo.reset()
    made = packing(kind)
    backend = backend_of(name)  # type: ignore[arg-type]
    on_device = replace(
        made,
        cu_seqlens=made.cu_seqlens.cuda(),
        cu_queries=None if made.cu_queries is None else made.cu_queries.cuda(),
    )
    for key_heads in (2,) if name == "flex" else (2, 4):
        exact = [t.bfloat16().float() for t in tensors(made, key_heads, width=64)]
        half = [t.bfloat16().cuda() for t in exact]
        for t in (*exact, *half):
            t.requires_grad_()
        refusal = backend.refusal(half[0], half[2], scoring)
        if refusal is not None or not supports(name, scoring, made):
            assert name == "varlen" or not made.causal
            continue
        out, expected = (
            backend.attend(*half, on_device, scoring),
            written_out(*exact, made, scoring),
        )
        # bf16 keeps 8 bits: one rounding of inputs and outputs.
        torch.testing.assert_close(out.float().cpu(), expected, atol=2e-2, rtol=2e-2)
        out.sum().backward()
        expected.sum().backward()
        for a, b in zip(half, exact, strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad.float().cpu(), b.grad, atol=5e-2, rtol=5e-2)


@gpu
@needs_cuda
def test_gpu_flex_takes_rows_of_any_length_and_leaks_nothing() -> None:
    backend = Flex()
    for lengths in ([300, 41, 7], [5, 900], [64] * 9):
        made = Packing(edges(lengths).cuda(), max(lengths))
        query, key, value = (t.cuda().bfloat16() for t in tensors(packing("", lengths), 2, 64))
        before = backend.attend(query, key, value, made, Scoring())
        value[: lengths[0]] += 1.0
        after = backend.attend(query, key, value, made, Scoring())
        assert torch.equal(before[lengths[0] :], after[lengths[0] :])
        assert not torch.equal(before[: lengths[0]], after[: lengths[0]])

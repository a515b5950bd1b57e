from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import Row, composed, one_by_one, packed_logits, row
from torch import Tensor, nn

from vistune.errors import ModelError
from vistune.models.attention import packed_attention, packing_mask
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [5, 17, 1, 9]


class Layer(nn.Module):
    """Stands for the attention module that asks."""

    is_causal = True

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def inputs(
    heads: int = 4, key_heads: int = 4, width: int = 16, lengths: list[int] = LENGTHS
) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, h, total, width, generator=made) for h in (heads, key_heads, key_heads)
    )


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def by_block_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: list[int] = LENGTHS,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by one large mask, written out: [1, T, H, D]."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    seen = (sample[:, None] == sample) & (position[:, None] >= position)
    if window is not None:
        seen &= position[:, None] - position < window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


CASES: list[dict[str, Any]] = [
    {},
    {"window": 4},
    {"window": 100},
    {"softcap": 1.5},
    {"softcap": 1.5, "window": 3},
    {"scale": 0.7},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [8, 8, 8], [11]])
def test_equals_a_block_mask(case: dict[str, Any], key_heads: int, lengths: list[int]) -> None:
    tensors = inputs(key_heads=key_heads, lengths=lengths)
    gradients = []
    outputs = []
    for way in ("packed", "mask"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        if way == "packed":
            out, _ = packed_attention(
                Layer(4 // key_heads),
                *leaves,
                packing_mask(cu(lengths), max(lengths)),
                scaling=case.get("scale"),
                sliding_window=case.get("window"),
                softcap=case.get("softcap"),
                position_ids=torch.arange(3),
                use_cache=False,
            )
        else:
            out = by_block_mask(*leaves, lengths=lengths, **case)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_packing_mask_holds_no_memory_of_its_own() -> None:
    mask = packing_mask(cu([60_000, 40_000]), 60_000)
    assert mask.shape == (1, 1, 60_000, 3) and mask.dtype is torch.int32
    assert mask.untyped_storage().nbytes() == 3 * 4


def test_capped_attention_of_a_padded_batch() -> None:
    query, key, value = (t.repeat(2, 1, 1, 1) for t in inputs(lengths=[6]))
    mask = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False  # the second row starts with two positions of padding
    query.requires_grad_()
    out, _ = packed_attention(Layer(), query, key, value, mask, softcap=1.5)
    expected = by_block_mask(
        query[1:, :, 2:], key[1:, :, 2:], value[1:, :, 2:], lengths=[4], softcap=1.5
    )
    torch.testing.assert_close(out[1:, 2:], expected, atol=1e-6, rtol=1e-5)
    whole, _ = packed_attention(Layer(), query, key, value, None, softcap=1.5)
    torch.testing.assert_close(out[0], whole[0], atol=1e-6, rtol=1e-5)
    out.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


def test_what_packed_rows_cannot_do_is_refused() -> None:
    tensors = inputs()
    mask = packing_mask(cu(LENGTHS), max(LENGTHS))
    with pytest.raises(ModelError, match="s_aux"):
        packed_attention(Layer(), *tensors, mask, s_aux=torch.zeros(4))
    with pytest.raises(ModelError, match="causal False"):
        packed_attention(Layer(), *tensors, mask, is_causal=False)
    with pytest.raises(ModelError, match="no key-value cache"):
        packed_attention(Layer(), tensors[0][:, :, :3], *tensors[1:], mask)


def test_decoder_that_ignores_the_mask_cannot_run(tmp_path: Path) -> None:
    model, facts = composed(tmp_path)
    model.language_model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError):  # the packing mask is of no shape that eager could add
        packed_logits(model, row(facts))


# --- on a GPU ---------------------------------------------------------------------------------


def on_gpu(made: Row) -> Row:
    return Row(
        [ids.cuda() for ids in made.ids],
        [None if image is None else image.cuda() for image in made.images],
    )


@gpu
@needs_cuda
@pytest.mark.parametrize("case", [{}, {"window": 4}, {"scale": 0.05}, {"softcap": 1.5}])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 20])
def test_gpu_equals_a_block_mask(case: dict[str, Any], key_heads: int, width: int) -> None:
    exact = [
        t.bfloat16().float().requires_grad_() for t in inputs(key_heads=key_heads, width=width)
    ]
    half = [t.detach().bfloat16().cuda().requires_grad_() for t in exact]
    expected = by_block_mask(*exact, **case)
    out, _ = packed_attention(
        Layer(4 // key_heads),
        *half,
        packing_mask(cu(LENGTHS).cuda(), max(LENGTHS)),
        scaling=case.get("scale"),
        sliding_window=case.get("window"),
        softcap=case.get("softcap"),
    )
    # bf16 keeps 8 bits: one rounding of inputs and outputs.
    torch.testing.assert_close(out.float().cpu(), expected, atol=2e-2, rtol=2e-2)
    expected.sum().backward()
    out.sum().backward()
    for a, b in zip(half, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.float().cpu(), b.grad, atol=5e-2, rtol=5e-2)


@gpu
@needs_cuda
@pytest.mark.parametrize("text", ["llama", "mistral", "gemma2", "qwen3"])
def test_gpu_packed_row_equals_samples(tmp_path: Path, text: str) -> None:
    model, facts = composed(tmp_path, text=text)
    model.cuda()
    made = on_gpu(row(facts))
    # Convolutions round to TF32 by default, which differs between batches of one and of two.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        exact = [logits.cpu() for logits in one_by_one(model, made)]
        in_fp32 = [logits.cpu() for logits in packed_logits(model, made)]
        model.bfloat16()
        in_bf16 = [logits.float().cpu() for logits in packed_logits(model, made)]
    for a, b, c in zip(exact, in_fp32, in_bf16, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
        assert F.cosine_similarity(c.flatten(), a.flatten(), dim=0) > 0.99


@gpu
@needs_cuda
def test_gpu_step_waits_for_nothing_and_leaks_nothing(tmp_path: Path) -> None:
    model, facts = composed(tmp_path)
    model.cuda().bfloat16().train()
    lora = {"mode": "lora", "rank": 4}
    apply_tuning(model, TuneConfig.model_validate({"language": lora}), seed=0)
    set_checkpoint_layers(model, 1)
    made = row(facts)
    tensors = on_gpu(made).packed

    def run(pixels: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model.logits(model.hidden_states(**{**tensors, "pixel_values_NCYX": pixels})[0])

    pixels = tensors["pixel_values_NCYX"]
    run(pixels).sum().backward()  # first calls may wait while kernels load
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = run(pixels)
        logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    changed = pixels.clone()
    changed[0] += 1.0
    other = run(changed)
    first, second, _ = (len(ids) for ids in made.ids)
    assert not torch.equal(other[:first], logits[:first])
    assert torch.equal(other[first:], logits[first:])
    assert second > 0


@gpu
@needs_cuda
def test_gpu_memory_does_not_grow_with_the_square_of_a_row() -> None:
    lengths = [1024] * 64
    query, key, value = (t.cuda().bfloat16() for t in inputs(4, 4, 64, lengths))
    mask = packing_mask(cu(lengths).cuda(), 1024)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_attention(Layer(), query, key, value, mask)
    # A boolean mask of the row alone would be 4 GiB.
    assert torch.cuda.max_memory_allocated() - before < 2**28

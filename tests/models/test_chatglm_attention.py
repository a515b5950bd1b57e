"""ChatGLM's packed attention: slices of samples, torch's flash kernel, and a mask agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistune.models.chatglm import ChatGLMConfig
from vistune.models.chatglm.attention import (
    PackedPrefixes,
    masked_attention,
    packed_attention,
    prefix_mask,
    rotary_tables,
    rotate,
)
from vistune.models.chatglm.positions import packed_positions

CONFIG = ChatGLMConfig(
    vocab_size=320,
    hidden_size=256,
    num_attention_heads=4,
    bos_token_id=304,
    gmask_token_id=301,
    mask_token_id=300,
)
PROMPTS, ANSWERS = (9, 1, 40, 2), (3, 7, 1, 30)


def row(device: str) -> tuple[Tensor, PackedPrefixes, Tensor]:
    """Positions, description and bounds of four samples of uneven prompts and answers."""
    samples = [
        torch.tensor([*[7] * (prompt - 1), 301, 304, *[8] * (answer - 1)])
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    lengths = torch.tensor([0, *map(len, samples)])
    cu_seqlens = lengths.cumsum(0).int().to(device)
    ids = torch.cat(samples)[None].to(device)
    positions, prompts = packed_positions(ids, cu_seqlens, CONFIG)
    assert prompts.tolist() == list(PROMPTS)
    return positions, PackedPrefixes.of(positions, prompts, cu_seqlens), cu_seqlens


def reference(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, cu: Tensor) -> Tensor:
    """The same by a T x T mask of each sample."""
    pieces = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        mask = prefix_mask(positions[:, :, start:end], None, num_past=0)
        part = slice(start, end)
        pieces.append(masked_attention(query[:, :, part], key[:, :, part], value[:, :, part], mask))
    return torch.cat(pieces, dim=2)


def compare(device: str, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients against fp32 under a mask."""
    torch.manual_seed(0)
    positions, prefixes, cu_seqlens = row(device)
    shape = (3, 1, 4, sum(PROMPTS) + sum(ANSWERS), 64)
    states = torch.randn(shape, device=device).to(dtype)
    ours = states.clone().requires_grad_()
    theirs = states.float().requires_grad_()
    out = packed_attention(*ours, prefixes)
    expected = reference(*theirs, positions, cu_seqlens)
    weight = torch.randn_like(expected)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    pairs = ((out.detach(), expected.detach()), (ours.grad, theirs.grad))
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def test_slices_equal_a_mask() -> None:
    # Float32, sums in another order.
    assert compare("cpu", torch.float32) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_flash_kernel_equals_a_mask(dtype: torch.dtype) -> None:
    # Weights and outputs are rounded to 8 (bf16) or 11 (fp16) bits.
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
    assert compare("cuda", dtype) < limit


def test_rotation_keeps_lengths_and_turns_by_differences() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 1, 1, CONFIG.head_dim).expand(1, 1, 4, -1)
    first, second = torch.tensor([0, 5, 2, 7]), torch.tensor([0, 0, 1, 1])
    turned = rotate(states, rotary_tables(torch.stack((first, second))[None], CONFIG))[0, 0]
    assert torch.allclose(turned.norm(dim=-1), states[0, 0].norm(dim=-1))
    # Pairs (0, 1) and (2, 3) are 5 apart in the first position and level in the second.
    assert torch.allclose(turned[0] @ turned[1], turned[2] @ turned[3], rtol=1e-4)
    assert not torch.allclose(turned[0] @ turned[1], turned[0] @ turned[2], rtol=1e-2)


def test_half_precision_angles_are_coarse_at_high_positions() -> None:
    far = torch.tensor([[[1500], [0]]])
    rough = ChatGLMConfig(rotary_angle_dtype="float16")
    exact, coarse = (rotary_tables(far, config)[0] for config in (ChatGLMConfig(), rough))
    assert float((exact - coarse).abs().max()) > 0.01
    near = torch.tensor([[[3], [0]]])
    exact, coarse = (rotary_tables(near, config)[0] for config in (ChatGLMConfig(), rough))
    assert torch.allclose(exact, coarse, atol=1e-3)

from __future__ import annotations

from typing import Any

import pytest
import torch

from vistune.device.attention import (
    AttentionNeeds,
    AttentionSupport,
    choose_attention,
    choose_row_attention,
)
from vistune.errors import DeviceError

BF16 = AttentionNeeds(128, torch.bfloat16)
CAPPED = AttentionNeeds(256, torch.bfloat16, softcap=True)
CUDA = AttentionSupport("cuda", hopper=True)


@pytest.mark.parametrize(
    ("support", "needs", "expected", "said"),
    [
        (AttentionSupport("cpu"), AttentionNeeds(64, torch.float32), "sdpa", "on any device"),
        (AttentionSupport("mps"), BF16, "sdpa", "on any device"),
        (CUDA, BF16, "varlen", "torch's own kernel"),
        (AttentionSupport("cuda", True, cudnn=True), BF16, "cudnn", "ragged rows"),
        (AttentionSupport("cuda", True, cudnn=True), CAPPED, "flex", "not cudnn: the model caps"),
        (AttentionSupport("cuda", cudnn=True), BF16, "varlen", "torch's own kernel"),
        (AttentionSupport("cuda", flash=2), BF16, "varlen", "torch's own kernel"),
        (AttentionSupport("cuda", True, flash=3), BF16, "flash_attn", "FlashAttention 3"),
        (AttentionSupport("cuda", False, flash=3), BF16, "varlen", "torch's own kernel"),
        (CUDA, CAPPED, "flex", "not varlen: the model caps attention scores"),
        (AttentionSupport("cuda", flash=2), CAPPED, "flash_attn", "not varlen"),
        (CUDA, AttentionNeeds(128, torch.float32), "sdpa", "takes 16-bit numbers"),
        (CUDA, AttentionNeeds(80, torch.float32), "sdpa", "these are float32"),
        (CUDA, AttentionNeeds(100, torch.bfloat16), "sdpa", "heads are 100 wide"),
        (CUDA, AttentionNeeds(64, torch.bfloat16, dropout=True), "sdpa", "drops attention"),
        (AttentionSupport("npu", npu=True), BF16, "npu", "fused attention"),
        (AttentionSupport("npu"), BF16, "sdpa", "torch_npu is not installed"),
        (AttentionSupport("npu", npu=True), CAPPED, "sdpa", "caps attention scores"),
    ],
)
def test_auto_takes_the_fastest_that_suits_and_says_why(
    support: AttentionSupport, needs: AttentionNeeds, expected: str, said: str
) -> None:
    choice = choose_attention("auto", support, needs)
    assert choice.name == expected and said in str(choice)


@pytest.mark.parametrize(
    ("wanted", "support", "needs", "got"),
    [
        ("varlen", AttentionSupport("cpu"), BF16, "the device is cpu"),
        ("flex", AttentionSupport("cpu"), BF16, "trains on cuda only"),
        ("npu", CUDA, BF16, "trains on npu only"),
        ("flash_attn", CUDA, BF16, "flash-attn is not installed"),
        ("varlen", CUDA, CAPPED, "caps attention scores"),
    ],
)
def test_one_named_that_does_not_suit_is_an_error(
    wanted: Any, support: AttentionSupport, needs: AttentionNeeds, got: str
) -> None:
    with pytest.raises(DeviceError, match=got) as raised:
        choose_attention(wanted, support, needs)
    assert raised.value.where == "train.attention"


@pytest.mark.parametrize(
    ("wanted", "support", "extra"),
    [
        ("flash_attn", CUDA, "flash"),
        ("cudnn", CUDA, "cudnn"),
        ("npu", AttentionSupport("npu"), "npu"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    wanted: Any, support: AttentionSupport, extra: str
) -> None:
    with pytest.raises(DeviceError) as raised:
        choose_attention(wanted, support, BF16)
    assert f"pip install 'vistune[{extra}]', or set train.attention=auto" in str(raised.value)
    with pytest.raises(DeviceError) as raised:  # no package would help here
        choose_attention(wanted, AttentionSupport("cpu"), BF16)
    assert "pip" not in str(raised.value)


def test_one_named_that_suits_is_taken() -> None:
    assert choose_attention("flex", CUDA, BF16).name == "flex"
    assert choose_attention("sdpa", CUDA, CAPPED).name == "sdpa"


def test_towers_gain_nothing_from_packing() -> None:
    tower = AttentionNeeds(64, torch.bfloat16)
    assert choose_row_attention("auto", CUDA, tower).name == "sdpa"
    assert choose_row_attention("flex", CUDA, tower).name == "sdpa"
    assert choose_row_attention("varlen", CUDA, tower).name == "varlen"
    odd = choose_row_attention("varlen", CUDA, AttentionNeeds(70, torch.bfloat16))
    assert odd.name == "sdpa" and "heads are 70 wide" in odd.reason

"""Tables of tensor names: forms, strictness, and what is not read."""

from __future__ import annotations

import pytest
import torch

from vistune.errors import WeightsError
from vistune.models.keymap import Entry, KeyMap, Unread, blocks, interleaved


def test_fused_rows_by_head_and_by_block_hold_the_same_projections() -> None:
    query, key, value = (torch.randn(6, 5) for _ in range(3))
    fused = blocks(3).join((query, key, value))
    assert torch.equal(fused, torch.cat((query, key, value)))
    by_head = interleaved(3, num_heads=2).join((query, key, value))
    assert torch.equal(by_head[:3], query[:3])
    assert torch.equal(by_head[3:6], key[:3])
    assert torch.equal(by_head[9:12], query[3:])
    assert not torch.equal(by_head, fused)
    for form, tensor in ((blocks(3), fused), (interleaved(3, num_heads=2), by_head)):
        assert all(map(torch.equal, form.split(tensor), (query, key, value)))
    bias = torch.arange(6.0)
    form = interleaved(3, num_heads=1)
    assert torch.equal(form.join(form.split(bias)), bias)


def test_every_name_is_accounted_for() -> None:
    table = KeyMap(
        layout="test",
        entries=(Entry("a", ("x",)), Entry("b", ("y",))),
        unread={"c": Unread("computed", lambda: torch.ones(1)), "d": Unread("old")},
    )
    tensors = {"a": torch.zeros(1), "b": torch.zeros(2)}
    own = table.from_public({**tensors, "c": torch.zeros(1), "d": torch.zeros(1)}, where="f")
    assert own.keys() == {"x", "y"}
    assert table.to_public(own, where="f").keys() == {"a", "b", "c"}
    with pytest.raises(WeightsError) as caught:
        table.from_public({"a": tensors["a"], "e": tensors["b"]}, where="f")
    assert "left over: e" in str(caught.value)
    assert "missing: b" in str(caught.value)
    with pytest.raises(WeightsError, match="left over"):
        table.to_public({**own, "x.lora_A": torch.zeros(1)}, where="f")

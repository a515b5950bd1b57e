"""Tokens that see some of what follows them: each sample's mask written out, packed as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vistune.errors import ModelError
from vistune.models.attention import ahead_mask, packing_mask, reach_of_prefixes, reach_of_runs
from vistune.models.attention.ahead import ahead_attention
from vistune.models.attention.contract import RowMemo, Scoring
from vistune.models.attention.per_sample import masked, repeat_heads

LENGTHS = (7, 4, 9)
IN_RUN = ((1, 4), None, (2, 8))
PREFIXES = (3, 4, 6)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = ((1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8))
    query, key, value = (torch.randn(shape, generator=made) for shape in shapes)
    return query, key, value


def edges() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def runs() -> Tensor:
    inside = []
    for length, run in zip(LENGTHS, IN_RUN, strict=True):
        here = torch.zeros(length, dtype=torch.bool)
        if run is not None:
            here[run[0] : run[1]] = True
        inside.append(here)
    return torch.cat(inside)


def allowed(sample: int, *, prefix: bool, window: int | None) -> Tensor:
    """The mask of one sample, as transformers writes it for Gemma 3 and PaliGemma 2."""
    length, run = LENGTHS[sample], IN_RUN[sample]
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = columns <= rows
    near = columns > rows - (window or length)
    if prefix:
        same = (rows < PREFIXES[sample]) & (columns < PREFIXES[sample])
        return (causal & near) | same
    start, stop = run or (0, 0)
    same = (rows >= start) & (rows < stop) & (columns >= start) & (columns < stop)
    return (causal | same) & near


def attended(
    query: Tensor, key: Tensor, value: Tensor, *, prefix: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    cu_seqlens = edges()
    reach = (
        reach_of_prefixes(cu_seqlens, torch.tensor(PREFIXES)) if prefix else reach_of_runs(runs())
    )
    mask = ahead_mask(cu_seqlens, max(LENGTHS), reach)
    out, _ = ahead_attention(
        nn.Identity(), query, key, value, mask, window_binds=not prefix, memo=RowMemo(), **options
    )
    return out, mask


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_each_sample_takes_its_own_mask(
    prefix: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vistune.models.attention.ahead._QUERY_BLOCK_TOKENS", 3)
    query, key, value = drawn()
    out, mask = attended(query, key, value, prefix=prefix, sliding_window=window, softcap=softcap)
    assert mask.untyped_storage().nbytes() == 4 * (len(LENGTHS) + 1 + sum(LENGTHS))
    start = 0
    for sample, length in enumerate(LENGTHS):
        part = slice(start, start + length)
        q = query[:, :, part]
        k, v = (repeat_heads(q, x[:, :, part]) for x in (key, value))
        seen = allowed(sample, prefix=prefix, window=window)
        expected = masked(q, k, v, seen, Scoring(softcap=softcap)).transpose(1, 2)
        torch.testing.assert_close(out[:, part], expected, atol=1e-6, rtol=1e-5)
        start += length


def test_no_sample_sees_another() -> None:
    query, key, value = drawn()
    before, _ = attended(query, key, value, prefix=True)
    key[:, :, LENGTHS[0] :] += 1.0
    value[:, :, LENGTHS[0] :] += 1.0
    after, _ = attended(query, key, value, prefix=True)
    assert torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
    assert not torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])


def test_reaches() -> None:
    inside = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    assert reach_of_runs(inside).tolist() == [0, 2, 2, 3, 4, 5, 6, 7]
    reach = reach_of_prefixes(torch.tensor([0, 3, 5]), torch.tensor([2, 0]))
    assert reach.tolist() == [1, 1, 2, 3, 4]


def test_other_masks_are_left_to_packed_attention() -> None:
    query, key, value = drawn()
    module = nn.Identity()
    plain = packing_mask(edges(), max(LENGTHS))
    reach = torch.arange(sum(LENGTHS))
    options: dict[str, Any] = {"window_binds": True, "memo": RowMemo()}
    causal, _ = ahead_attention(module, query, key, value, plain, **options)
    same, _ = ahead_attention(
        module, query, key, value, ahead_mask(edges(), max(LENGTHS), reach), **options
    )
    torch.testing.assert_close(causal, same)
    with pytest.raises(ModelError, match="sinks"):
        mask = ahead_mask(edges(), max(LENGTHS), reach)
        ahead_attention(module, query, key, value, mask, sinks=query, **options)

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from test_step import fresh, step
from train_fakes import make_row, resolved_recipe, run

from vistune.train import step as step_module
from vistune.train.padding import padded


def test_a_row_is_filled_up_by_a_sample_of_its_own() -> None:
    row = make_row((7, 4), seed=0)
    filled = padded(row, 20)
    assert filled.input_ids_BT.shape == filled.position_ids_BT.shape == (1, 20)
    assert filled.cu_seqlens.tolist() == [0, 7, 11, 20] and filled.max_seqlen == 9
    assert filled.position_ids_BT[0, 11:].tolist() == list(range(9))
    assert torch.equal(filled.input_ids_BT[:, :11], row.input_ids_BT)
    assert filled.num_samples == 2 and filled.target_index_M is row.target_index_M
    assert padded(row, 11) is row and padded(row, 5) is row


def test_positions_of_several_axes_are_filled_too() -> None:
    row = make_row((7, 4), seed=0)
    axes = row._map({"position_ids_BT": row.position_ids_BT.expand(3, 1, -1)})
    filled = padded(axes, 15).position_ids_BT
    assert filled.shape == (3, 1, 15) and filled[2, 0, 11:].tolist() == [0, 1, 2, 3]


def test_loss_and_gradients_stay_what_they_were(monkeypatch: Any) -> None:
    rows = [make_row((7, 4), seed=0), make_row((9,), seed=1)]
    model, other = fresh(), fresh()
    _, sums = step(model, rows)
    original = step_module.backward_step
    found = []
    monkeypatch.setattr(
        "test_step.backward_step",
        lambda *args, **kwargs: found.append(original(*args, **kwargs, pad_tokens=32)) or found[0],
    )
    step(other, rows)
    assert sums == found[0]
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5, msg=name)


def test_a_run_counts_what_it_fills_up_as_padding(tmp_path: Any) -> None:
    train = {"steps": 3, "compile": "static_blocks"}
    run(resolved_recipe(tmp_path / "r", train=train, batch={"samples": 3, "max_tokens": 40}))
    first = json.loads((tmp_path / "r" / "metrics.jsonl").open().readline())
    assert first["tokens"] == 20 and first["padding_frac"] == 1 - 20 / 80


def test_a_prompt_read_both_ways_has_a_length_in_every_sample() -> None:
    row = replace(make_row((7, 4), seed=0), prompt_lengths=(3, 2))
    filled = padded(row, 20)
    assert filled.prompt_lengths == (3, 2, 9)
    assert len(filled.prompt_lengths) == filled.cu_seqlens.shape[0] - 1

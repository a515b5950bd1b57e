"""Peaks measured on an H200 (bench/h200/native_measured.json) are what is predicted without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "bench" / "h200"))
from native_grid import Row, draw_row, facts_of, size_of

from vistune import _compat
from vistune.models.native import native_skeleton
from vistune.models.native_memory import native_memory
from vistune.recipe import TrainConfig, TuneConfig

ROOT = Path(__file__).parents[3]
MEASURED = json.loads((ROOT / "bench" / "h200" / "native_measured.json").read_text())
GOAL = 0.02
"""The largest error of the published grid is 0.8 %; releases of transformers keep a little more or
less."""
QUICK = {("smolvlm-2.2b", "full"), ("qwen2.5-vl-7b", "frozen")}
ROWS = [
    pytest.param(
        entry,
        id=Row(**{k: v for k, v in entry.items() if k not in ("gib", "untied")}).name,
        marks=() if (entry["model"], entry["mode"]) in QUICK else pytest.mark.slow,
    )
    for entry in MEASURED["rows"]
]


@pytest.mark.parametrize("entry", ROWS)
def test_the_grid(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "varlen_repeats_groups", lambda: False)  # cuDNN took groups
    entry = dict(entry)
    measured, untied = entry.pop("gib"), entry.pop("untied", False)
    row = Row(**entry)
    tune = row.tune
    if untied:  # the head these models were measured with stayed frozen
        tree = tune.model_dump(mode="json") | {"head": {"mode": "freeze"}}
        tune = TuneConfig.model_validate(tree)
    facts = facts_of(row, tiny=False, untied=untied)
    train = {
        "steps": 1,
        "checkpoint_tower_layers": row.tower_layers,
        "kernels": row.kernels,
    }
    memory = native_memory(
        facts,
        tune=tune,
        train=TrainConfig.model_validate(train),
        dtype=torch.bfloat16,
        kind="cuda",
    )
    with torch.device("meta"):
        described = native_skeleton(facts)
    size = size_of(draw_row(row.tokens, described), described)
    predicted = memory.predict(size, checkpoint_layers=row.layers)
    error = predicted.peak_gib / measured - 1
    print(f"{row.name:40} {predicted.peak_gib:.2f} GiB, measured {measured:.2f}, {error:+.1%}")
    assert abs(error) <= GOAL

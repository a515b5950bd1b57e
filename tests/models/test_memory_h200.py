"""Predicted peaks against those measured on an H200 (bench/h200/measured.json): within 5 %.

Nothing is run here: the predictions are made anew from configs. Prints the comparison with -s.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "h200"))
from families import MGM_TUNE, mgm_config
from families import facts_of as family_facts
from plan_grid import Case, draw_row, facts_of

from vistune import _compat
from vistune.models.memory import RowSize, memory_model
from vistune.recipe import ConnectorConfig, ModelConfig, TrainConfig, TuneConfig

pytestmark = pytest.mark.slow

MEASURED = json.loads(
    (Path(__file__).parents[2] / "bench" / "h200" / "measured.json").read_text(encoding="utf-8")
)
GOAL = 0.05


def model_of(case, tune):
    return memory_model(
        ModelConfig.model_construct(connector=ConnectorConfig()),
        facts_of(case, tiny=False),
        tune=tune,
        train=TrainConfig(steps=1),
        dtype=torch.bfloat16,
        fused=True,
    )


def compare(name, predicted, measured):
    error = predicted / measured - 1
    print(f"{name:28} predicted {predicted:6.2f} GiB, measured {measured:6.2f}, {error:+.1%}")
    assert abs(error) <= GOAL


@pytest.mark.parametrize("entry", MEASURED["grid"], ids=lambda e: f"{e['size']} {e['mode']}")
def test_the_grid(entry, monkeypatch):
    # Measured with torch 2.11, whose varlen attention wants grouped key heads repeated.
    monkeypatch.setattr(_compat, "varlen_repeats_groups", lambda: True)
    entry = dict(entry)
    measured = entry.pop("gib")
    case = Case(**entry)
    row = draw_row(case.tokens, facts_of(case, tiny=False))
    size = RowSize(row.num_tokens, row.num_samples, row.num_targets, row.num_targets)
    predicted = model_of(case, case.tune).predict(size, checkpoint_layers=case.layers)
    compare(case.name, predicted.peak_gib, measured)


@pytest.mark.parametrize("entry", MEASURED["runs"], ids=lambda e: e["row"])
def test_whole_runs(entry):
    """The longest row of each benchmark run, which was rehearsed before the first step."""
    case = Case("7b", entry["mode"], entry["tokens"])
    tune = case.tune.model_dump(mode="json")
    if "rank" in entry:
        tune["language"]["rank"] = entry["rank"]
    memory = model_of(case, TuneConfig.model_validate(tune))
    targets = entry["targets"]
    predicted = memory.predict(RowSize(entry["tokens"], entry["images"], targets, targets))
    # The rehearsal of the earlier runs came before the optimizer had made its state.
    state = sum(b.optimizer for b in memory.roles.values()) / 2**30
    state = 0.0 if entry.get("with_state") else state
    compare(entry["row"], predicted.peak_gib - state, entry["gib"])


@pytest.mark.parametrize("entry", MEASURED["families"], ids=lambda e: e["row"])
def test_families(entry, monkeypatch):
    """MGM-2B's two stages; the runs rehearsed their longest row."""
    monkeypatch.setattr(_compat, "varlen_repeats_groups", lambda: True)
    memory = memory_model(
        ModelConfig.model_construct(connector=ConnectorConfig()),
        family_facts(mgm_config(tiny=False)),
        tune=TuneConfig.model_validate(MGM_TUNE[entry["row"]]),
        train=TrainConfig(steps=1),
        dtype=torch.bfloat16,
        fused=True,
    )
    targets = entry["targets"]
    predicted = memory.predict(RowSize(entry["tokens"], entry["images"], targets, targets))
    compare(entry["row"], predicted.peak_gib, entry["gib"])

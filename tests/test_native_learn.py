"""Each of transformers' own models on photographs: twenty steps bring the loss down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent / "models"))
sys.path.insert(0, str(Path(__file__).parent / "models" / "native"))

from native_dirs import KINDS, write_native
from real_pictures import write_real_pictures

from vistune.checkpoint.run_dir import RunDirectory
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train

STEPS = 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learn") / "pictures"
    write_real_pictures(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_twenty_steps_on_photographs(pictures: Path, tmp_path: Path, kind: str) -> None:
    tree: dict[str, Any] = {
        "name": "learn",
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"from_checkpoint": str(write_native(kind, tmp_path / "model"))},
        "tune": {role: {"mode": "full"} for role in ("vision", "connector", "language")},
        "data": {
            "train": [{"path": str(pictures / "train.json"), "images": str(pictures)}],
            "workers": 0,
        },
        "batch": {"samples": 7, "max_tokens": 2048},
        "train": {"steps": STEPS, "lr": 4e-3, "schedule": "constant", "warmup_frac": 0.0},
        "log": {"tensorboard": False, "progress": False},
    }
    made = ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")
    train(made, console=Console(quiet=True))
    lines = RunDirectory(tmp_path / "run").metrics.read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    # Every step sees every picture, so steps compare; the first loss is near that of guessing.
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0], losses

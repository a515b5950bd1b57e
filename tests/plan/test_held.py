"""What transformers' own models hold: added up without weights, equal to the model as built."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "native"))

from native_dirs import KINDS, write_native

from vistune.assembly import build, draw
from vistune.cli.app import app
from vistune.errors import ModelError
from vistune.models.tune import apply_tuning
from vistune.plan import held, make_plan
from vistune.plan.devices import KnownDevice
from vistune.recipe import Recipe

TUNE = {
    "vision": {"mode": "lora", "rank": 2},
    "connector": {"mode": "full"},
    "language": {"mode": "lora", "rank": 2},
}


def recipe(model: Path, **more: Any) -> Recipe:
    tree = {
        "name": "t",
        "device": "cpu",
        "model": {"from_checkpoint": str(model)},
        "data": {"train": [{"path": "d.json"}]},
        "tune": TUNE,
        "batch": {"samples": 1, "max_tokens": 512},
        "train": {"steps": 1},
        **more,
    }
    return Recipe.model_validate(tree)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_is_what_the_built_model_holds(tmp_path: Path, kind: str) -> None:
    one = recipe(write_native(kind, tmp_path / "model"))
    blueprint = draw(one)
    found = held(one, blueprint.facts, KnownDevice("x", 1.0), dtype=torch.bfloat16)
    model = build(blueprint, seed=0, dtype=torch.bfloat16)
    apply_tuning(model, one.tune, seed=0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(role.weights for role in found.roles.values()) == weights
    assert sum(role.gradients for role in found.roles.values()) == 4 * trained
    assert sum(role.optimizer for role in found.roles.values()) == 8 * trained
    assert (found.num_trainable, found.can_fit) == (trained, True)


def test_rounded_weights_are_counted_as_held(tmp_path: Path) -> None:
    folder = write_native("qwen2_5_vl", tmp_path / "model")
    totals = []
    for form in ("same", "int8", "nf4"):
        tune = {**TUNE, "language": {"mode": "lora", "rank": 2, "frozen_format": form}}
        one = recipe(folder, tune=tune)
        found = held(one, draw(one).facts, KnownDevice("x", 1.0), dtype=torch.bfloat16)
        totals.append(found.roles["language"].weights)
    assert totals[0] > totals[1] > totals[2]
    towers = []
    for form in ("same", "int8", "nf4"):
        one = recipe(folder, tune={**TUNE, "vision": {"mode": "freeze", "frozen_format": form}})
        found = held(one, draw(one).facts, KnownDevice("x", 1.0), dtype=torch.bfloat16)
        towers.append(found.roles["vision"].weights)
    assert towers[0] > towers[1] > towers[2]


def command(folder: Path, file: Path, *arguments: str, **more: Any) -> Any:
    tree = recipe(folder, **more).model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps(tree))
    return CliRunner().invoke(app, ["plan", str(file), "--device", "h200", *arguments])


def test_the_command_says_what_is_not_known(tmp_path: Path) -> None:
    folder = write_native("qwen3_vl_moe", tmp_path / "model")
    done = command(folder, tmp_path / "t.yaml")
    assert done.exit_code == 0, done.output
    assert "not predicted for this model (experts" in done.output
    assert "weights train" in done.output
    done = command(folder, tmp_path / "t.yaml", "--memory-gib", "0.5")
    assert done.exit_code == 1 and "does not fit" in done.output
    with pytest.raises(ModelError, match=r"set batch\.max_tokens"):
        make_plan(recipe(folder, batch={"max_tokens": "auto", "samples": 1}), device="h200")


def test_the_command_predicts_the_others(tmp_path: Path) -> None:
    folder = write_native("qwen3_vl", tmp_path / "model")
    open_batch = {"max_tokens": "auto", "samples": 1}
    train = {"steps": 1, "checkpoint_layers": "auto"}
    done = command(folder, tmp_path / "t.yaml", batch=open_batch, train=train)
    assert done.exit_code == 0, done.output
    assert "batch.max_tokens 32,768" in done.output and "peak:" in done.output
    # Four patches of 4 x 4 pixels behind a token, in a row full of images.
    assert "patches" in done.output and "train.checkpoint_layers 0 of 3" in done.output


def test_images_of_the_longest_row_are_counted(tmp_path: Path) -> None:
    rows = []
    for number, side in enumerate((16, 64, 32)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a" * 5}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    source = {"path": str(tmp_path / "d.json"), "images": str(tmp_path)}
    one = recipe(
        write_native("qwen2_vl", tmp_path / "model"),
        data={"train": [source], "workers": 0},
        batch={"samples": 1, "max_tokens": "auto"},
    )
    made = make_plan(one, device="h200", read_data=True)
    # 64 pixels become 4 x 4 tokens of 4 patches, and the marks around them count as tokens too.
    assert made.which == "the longest row" and made.row.num_patches == 4 * (4 * 4 + 2)
    assert made.row.num_pairs == made.row.num_tokens**2 and made.row_tflop is not None


def test_a_row_of_images_may_need_more_than_a_longer_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate((("<image>\nq", "a"), ("q", "a" * 50))):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns})
    rows[0]["image"] = "0.png"
    (tmp_path / "d.json").write_text(json.dumps(rows))
    one = recipe(
        write_native("qwen2_vl", tmp_path / "model"),
        data={"train": [{"path": str(tmp_path / "d.json"), "images": str(tmp_path)}], "workers": 0},
        batch={"samples": 1, "max_tokens": 512},
        tune={**TUNE, "vision": {"mode": "full"}},
    )
    made = make_plan(one, device="h200", read_data=True)
    assert made.which == "the row with most image tokens"
    assert made.row.num_patches == 4 * (4 * 4 + 2) and made.row.num_tokens == 42
    longest = replace(made.row, num_tokens=72, num_patches=0, num_pairs=72**2)
    assert made.prediction.peak > made.room.memory.predict(longest).peak

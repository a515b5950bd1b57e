"""Every shipped recipe trains two steps: its own tuning, template and schedule on tiny weights."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "native"))

import pytest
from native_dirs import write_native
from rich.console import Console
from seed_recipes import is_seed_recipe, seed_settings

from vistune.recipe import load_recipe, shipped_recipes
from vistune.train import train

QUIET = Console(quiet=True)


NATIVE = {"native/qwen2.5-vl-3b-lora": "qwen2_5_vl", "native/smolvlm-lora": "smolvlm"}
"""Which of transformers' own models a recipe is for."""


def tiny_settings(tiny: Path, name: str, run_dir: Path, stage1: Path | None) -> list[str]:
    """Overrides that shrink a recipe without touching what it is about."""
    recipe = load_recipe(name).recipe
    settings = [
        f"run_dir={run_dir}",
        "device=cpu",
        f"data.train=[{{path: {tiny / 'train.json'}, images: {tiny / 'images'}}}]",
        "data.workers=0",
        "train.epochs=null",
        "train.steps=2",
        "train.threads=1",
        "save.every_steps=1",
        "batch.max_tokens=256",
        "sample.images=[]",
    ]
    settings.append("batch.tokens=256" if recipe.batch.tokens else "batch.samples=4")
    if name in NATIVE:
        model = run_dir.with_name("native")
        write_native(NATIVE[name], model)
        settings += [f"model.from_checkpoint={model}", "batch.max_tokens=512"]
    elif is_seed_recipe(name):
        settings += ["batch.max_tokens=1024", *seed_settings(name, run_dir.with_name("models"))]
    elif recipe.model.from_checkpoint is None:
        settings += [
            f"model.vision_tower.path={tiny / 'clip'}",
            f"model.language_model.path={tiny / 'llama'}",
        ]
    else:
        settings.append(f"model.from_checkpoint={stage1}")
    return settings


@pytest.fixture(scope="module")
def stage1(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("stage1") / "run"
    name = "llava-1.5/7b-pretrain"
    train(load_recipe(name, tiny_settings(tiny, name, run_dir, None)), console=QUIET)
    return run_dir


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_two_steps(name, tiny, stage1, tmp_path):
    result = train(
        load_recipe(name, tiny_settings(tiny, name, tmp_path / "run", stage1)), console=QUIET
    )
    assert result.steps == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(0 < json.loads(line)["loss"] < 20 for line in lines)
    manifest = json.loads((result.checkpoint / "vistune.json").read_text())
    trained = load_recipe(name).recipe.tune.model_dump(mode="json")
    assert {role: t["mode"] for role, t in manifest["tune"].items()} == {
        role: t["mode"] for role, t in trained.items()
    }

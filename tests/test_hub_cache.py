"""Models named by hub id: from the hub's cache through a run to its export; without a network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from tiny_llava import make
from vistune.assembly import draw, load_assembled
from vistune.checkpoint.manifest import read_manifest
from vistune.errors import CheckpointError, ModelError
from vistune.export import export_model
from vistune.models.hub import commit_of, fetch, in_cache, is_hub_id
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train import train

FIRST, SECOND = "1" * 40, "2" * 40
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, num_samples=8)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Path:
    """A cache of the hub that holds the tiny parts and the whole, and nothing to reach beyond."""
    cache = tmp_path / "hub"
    for name in ("clip", "llama", "hf"):
        put(cache, f"me/{name}", FIRST, tiny / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def put(cache: Path, name: str, commit: str, files: Path) -> Path:
    """Puts a commit into the cache, as its main branch."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    shutil.copytree(files, folder)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def recipe(tiny: Path, run: Path, model: dict[str, Any]) -> ResolvedRecipe:
    tree = {
        "name": "x",
        "run_dir": str(run),
        "device": "cpu",
        "model": model,
        "tune": {"connector": {"mode": "full"}, "language": {"mode": "lora", "rank": 2}},
        "data": {
            "train": [{"path": str(tiny / "train.json"), "images": str(tiny / "images")}],
            "template": "vicuna_v1",
            "workers": 0,
        },
        "batch": {"samples": 4, "max_tokens": 4096},
        "train": {"steps": 1, "lr": 1e-3},
        "log": {"tensorboard": False},
    }
    return ResolvedRecipe(recipe=Recipe.model_validate(tree), sources={}, origin="test")


PARTS = {"vision_tower": {"path": "me/clip"}, "language_model": {"path": "me/llama"}}


def test_parts_are_pinned_to_what_was_read(hub: Path, tiny: Path, tmp_path: Path) -> None:
    train(recipe(tiny, tmp_path / "run", PARTS), console=QUIET)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = read_manifest(checkpoint)
    assert manifest.parts is not None and manifest.parts.language_model is not None
    assert manifest.parts.language_model.path == "me/llama"
    assert manifest.parts.language_model.revision == FIRST
    assert set(manifest.part_fingerprints) == {"vision", "language", "tokenizer"}
    assert (checkpoint / "part_files" / "language" / "tokenizer.json").is_file()
    # The branch goes on to other weights: the run does not.
    newer = put(hub, "me/llama", SECOND, tiny / "llama")
    (newer / "model.safetensors").write_bytes(b"something else")
    load_assembled(tmp_path / "run")
    adapter = export_model(tmp_path / "run", to="adapter", output=tmp_path / "adapter")
    config = json.loads((adapter / "language_model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/llama"
    shutil.rmtree(hub / "models--me--llama" / "snapshots" / FIRST)
    with pytest.raises(ModelError, match=f"at revision {FIRST}"):
        load_assembled(tmp_path / "run")


def test_a_whole_model_by_its_hub_id(hub: Path, tiny: Path, tmp_path: Path) -> None:
    train(recipe(tiny, tmp_path / "run", {"from_checkpoint": "me/hf"}), console=QUIET)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    parts = read_manifest(checkpoint).parts
    assert parts is not None and (parts.from_checkpoint, parts.revision) == ("me/hf", FIRST)
    assert load_assembled("me/hf").origin == hub / "models--me--hf" / "snapshots" / FIRST
    load_assembled(tmp_path / "run")
    pinned = recipe(tiny, tmp_path / "x", {"from_checkpoint": "me/hf", "revision": SECOND})
    with pytest.raises(ModelError, match=f"at revision {SECOND}"):
        draw(pinned.recipe)
    local = {"from_checkpoint": str(tiny / "hf"), "revision": "main"}
    with pytest.raises(ModelError, match="only what is named by its hub id has revisions"):
        draw(recipe(tiny, tmp_path / "x", local).recipe)


def test_a_model_is_described_before_its_weights_are_there(hub: Path, tiny: Path) -> None:
    for name in ("clip", "llama", "hf"):
        (hub / f"models--me--{name}" / "snapshots" / FIRST / "model.safetensors").unlink()
    for model in (PARTS, {"from_checkpoint": "me/hf"}):
        draw(recipe(tiny, hub / "x", model).recipe)
    with pytest.raises(ModelError, match="small files of this model, and no weights") as caught:
        load_assembled("me/hf")
    assert "hf download me/hf" in str(caught.value.fix)


def test_what_is_nowhere_says_so_at_once(hub: Path, tiny: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({**PARTS, "language_model": {"path": "me/none"}}, "model.language_model.path"),
        ({**PARTS, "vision_tower": {"path": "me/none"}}, "model.vision_tower.path"),
        ({"from_checkpoint": "me/none"}, "model.from_checkpoint"),
    ]
    for model, key in cases:
        with pytest.raises(ModelError) as caught:
            draw(recipe(tiny, tmp_path / "run", model).recipe)
        assert "not in the hub's cache" in str(caught.value) and key in str(caught.value.fix)
        assert "hf download me/none" in str(caught.value.fix)
    with pytest.raises(CheckpointError, match="no such directory"):
        draw(recipe(tiny, tmp_path / "run", {"from_checkpoint": "runs/none"}).recipe)


def test_old_weights_are_taken_where_there_are_no_new_ones(hub: Path) -> None:
    folder = hub / "models--me--clip" / "snapshots" / FIRST
    assert fetch("me/clip", key="k") == folder and commit_of(folder) == FIRST
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fetch("me/clip", key="k") == folder
    assert in_cache("me/clip") and not in_cache("me/none")


def test_what_can_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_hub_id("openai/clip-vit-large-patch14-336") and is_hub_id("gpt2")
    for name in ("mine", "mine/typo", "runs/x", "checkpoints/x", "/a/b", "./a", "a/b/c", "~/x"):
        assert not is_hub_id(name), name

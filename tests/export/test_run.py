"""Exports from a checkpoint on disk, as `vistune export` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import encoder, packed_logits, parts, row

from vistune._version import __version__
from vistune.assembly import draw, load_assembled
from vistune.checkpoint.fingerprint import fingerprint_parts
from vistune.checkpoint.manifest import Manifest, anchored, read_manifest
from vistune.checkpoint.merge import merge_adapters
from vistune.checkpoint.save import CheckpointContent, save_checkpoint
from vistune.errors import CheckpointError
from vistune.export import export_model
from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import ModelFacts, describe
from vistune.models.tune import apply_tuning, trainable_state
from vistune.recipe import ModelConfig, Recipe, TuneConfig

TUNE: dict[str, Any] = {"language": {"mode": "lora", "rank": 2}}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def checkpoint(
    shelf: Path, folder: Path, *, inherited: bool = False
) -> tuple[ComposedVLM, ModelFacts]:
    """Writes a checkpoint with adapters that say something; returns the merged model."""
    config = parts(shelf)
    facts = describe(config)
    model = build_model(config, facts, seed=5, dtype=torch.float32)
    apply_tuning(model, TuneConfig.model_validate(TUNE), seed=5)
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    embeddings = {"language_model.model.norm.weight": torch.ones(32)} if inherited else {}
    content = CheckpointContent(
        step=3,
        weights=trainable_state(model),
        trainer={},
        manifest=Manifest(
            vistune_version=__version__,
            kind="checkpoint",
            parts=config,
            part_fingerprints=fingerprint_parts(config),
            tune=TUNE,
            seed=5,
            encoder=encoder(facts).to_state(),
            step=3,
        ),
        inherited=embeddings,
    )
    save_checkpoint(folder, content, keep=1)
    merge_adapters(model)
    return model.eval(), facts


def test_every_form_answers_like_the_run(shelf: Path, tmp_path: Path) -> None:
    model, facts = checkpoint(shelf, tmp_path / "step_3")
    made = row(facts)
    expected = packed_logits(model, made)
    for form in ("hf", "vistune"):
        written = export_model(tmp_path / "step_3", to=form, output=tmp_path / form)
        again = load_assembled(written)
        found = packed_logits(again.model, made)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b[:, : a.shape[1]], a, atol=1e-5, rtol=1e-5)
    manifest = read_manifest(tmp_path / "vistune")
    assert manifest.kind == "model" and manifest.parts is None and manifest.tune == {}
    assert manifest.merged_from == (str(tmp_path / "step_3"),)
    # A whole directory can be exported on; it holds of the encoder what the model uses of it.
    export_model(tmp_path / "vistune", to="hf", output=tmp_path / "hf2")
    state, other = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "hf2"))
    more = state.keys() - other.keys()
    assert other.keys() < state.keys() and all(".encoder.layers.2." in name for name in more)
    layers = [
        json.loads((tmp_path / d / "config.json").read_text())["vision_feature_layer"]
        for d in ("hf", "hf2")
    ]
    assert layers == [-2, -1]
    found = packed_logits(load_assembled(tmp_path / "hf2").model, made)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b[:, : a.shape[1]], a, atol=1e-5, rtol=1e-5)


def test_adapter_form(shelf: Path, tmp_path: Path) -> None:
    checkpoint(shelf, tmp_path / "step_3")
    written = export_model(tmp_path / "step_3", to="adapter", output=tmp_path / "adapter")
    names = load_file(written / "language_model" / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    with pytest.raises(CheckpointError, match="something here"):
        export_model(tmp_path / "step_3", to="adapter", output=written)
    export_model(tmp_path / "step_3", to="adapter", output=written, overwrite=True)


def test_adapters_on_changed_weights_have_no_base(shelf: Path, tmp_path: Path) -> None:
    checkpoint(shelf, tmp_path / "step_3", inherited=True)
    with pytest.raises(CheckpointError, match="an earlier run trained"):
        export_model(tmp_path / "step_3", to="adapter", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_directory_has_no_adapters(shelf: Path, tmp_path: Path) -> None:
    checkpoint(shelf, tmp_path / "step_3")
    whole = export_model(tmp_path / "step_3", to="vistune", output=tmp_path / "whole")
    with pytest.raises(CheckpointError, match="only a run"):
        export_model(whole, to="adapter", output=tmp_path / "out")


def test_format_of_the_weights(shelf: Path, tmp_path: Path) -> None:
    checkpoint(shelf, tmp_path / "step_3")
    export_model(tmp_path / "step_3", to="hf", output=tmp_path / "half", dtype=torch.bfloat16)
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("file", "role"), [("model.safetensors", "language"), ("tokenizer.json", "tokenizer")]
)
def test_a_base_that_was_changed_since_does_not_answer(
    tmp_path: Path, file: str, role: str
) -> None:
    checkpoint(tmp_path / "parts", tmp_path / "step_3")
    language = read_manifest(tmp_path / "step_3").parts
    assert language is not None and language.language_model is not None
    changed = Path(language.language_model.path) / file
    before = changed.read_bytes()
    load_assembled(tmp_path / "step_3")
    if file == "tokenizer.json":  # still one that loads
        changed.write_bytes(before + b"\n")
    else:
        changed.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
    with pytest.raises(CheckpointError, match=f"files of .*{role}.* were changed"):
        export_model(tmp_path / "step_3", to="vistune", output=tmp_path / "out")
    changed.write_bytes(before)
    load_assembled(tmp_path / "step_3")


def test_parts_are_named_from_the_root(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parts(shelf)
    monkeypatch.chdir(shelf)
    model = config.model_dump()
    for part in ("vision_tower", "language_model"):
        model[part]["path"] = str(Path(model[part]["path"]).relative_to(shelf))
    tree = {
        "name": "x",
        "run_dir": "run",
        "model": model,
        "data": {"train": [{"path": "rows.json", "images": "."}], "template": "vicuna_v1"},
        "batch": {"samples": 1, "max_tokens": 512},
        "train": {"steps": 1, "lr": 1e-3},
    }
    recipe = Recipe.model_validate(tree)
    drawn = draw(recipe).parts
    assert drawn == config != recipe.model
    monkeypatch.chdir(tmp_path)  # where a checkpoint is read says nothing of where it was made
    assert fingerprint_parts(drawn) == fingerprint_parts(config) != {}
    named = ModelConfig(from_checkpoint="somebody/some-model")
    assert anchored(named).from_checkpoint == "somebody/some-model"

"""A checkpoint keeps the small files of its parts and goes by them."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest

from vistune.checkpoint.described import (
    keep_small_files,
    moved,
    on_bases,
    places,
    require_there,
    take_along,
    view,
)
from vistune.errors import CheckpointError
from vistune.models.hub import is_small
from vistune.recipe import BasesConfig, ModelConfig


def parts_in(folder: Path) -> ModelConfig:
    for name in ("tower", "language"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"of": name, "deep": {"theta": 1}}))
        (folder / name / "model.safetensors").write_bytes(b"weights of " + name.encode())
    (folder / "language" / "tokenizer.json").write_text("{}")
    (folder / "language" / "model.safetensors.index.json").write_text("{}")
    return ModelConfig.model_validate(
        {
            "vision_tower": {"path": str(folder / "tower")},
            "language_model": {"path": str(folder / "language")},
        }
    )


def kept(parts: ModelConfig, folder: Path) -> Path:
    keep_small_files(parts, folder / "run")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    take_along(folder / "run", checkpoint / "part_files")
    return checkpoint


def test_only_what_describes_a_part_is_kept(tmp_path: Path) -> None:
    checkpoint = kept(parts_in(tmp_path), tmp_path)
    found = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    assert found == [
        "part_files/language/config.json",
        "part_files/language/tokenizer.json",
        "part_files/vision/config.json",
    ]
    small = ("ice_text.model", "chat_template.jinja", "qwen.tiktoken", "vocab.txt", "merges.txt")
    assert all(map(is_small, small))
    assert not any(map(is_small, ("a.safetensors", "m.bin", "README.md", "modeling.py", "1.gguf")))


def test_a_view_shows_kept_files_and_the_bases_weights(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    checkpoint = kept(parts, tmp_path)
    language = tmp_path / "language"
    (language / "config.json").write_text(json.dumps({"of": "language", "deep": {"theta": 2}}))
    (language / "chat_template.jinja").write_text("added since")
    shown = view(parts, checkpoint)
    assert shown is not None
    seen = places(shown.parts)["language"]
    assert json.loads((seen / "config.json").read_text())["deep"] == {"theta": 1}
    assert (seen / "model.safetensors").read_bytes() == b"weights of language"
    assert (seen / "model.safetensors.index.json").is_file()
    assert not (seen / "chat_template.jinja").exists()
    (note,) = shown.notes
    assert "config.json (deep.theta: 1 -> 2)" in note and "chat_template.jinja" in note
    assert str(language) in note and "language model" in note
    root = seen.parent
    del shown
    gc.collect()
    assert not root.exists()
    assert (language / "model.safetensors").is_file() and (checkpoint / "part_files").is_dir()


def test_nothing_is_said_of_a_base_that_is_as_it_was(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    shown = view(parts, kept(parts, tmp_path))
    assert shown is not None and shown.notes == ()


def test_a_checkpoint_of_an_earlier_version_has_no_view(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    assert view(parts_in(tmp_path), tmp_path / "old") is None


def test_keeping_again_leaves_earlier_checkpoints_as_they_are(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    checkpoint = kept(parts, tmp_path)
    (tmp_path / "language" / "config.json").write_text("{}")
    keep_small_files(parts, tmp_path / "run")
    assert (tmp_path / "run" / "language" / "config.json").read_text() == "{}"
    assert "theta" in (checkpoint / "part_files" / "language" / "config.json").read_text()


def test_a_missing_base_says_where_it_was_and_what_to_do(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    require_there(parts, ["vision", "language", "tokenizer"], checkpoint=tmp_path)
    shutil.move(tmp_path / "language", tmp_path / "away")
    with pytest.raises(CheckpointError) as caught:
        require_there(parts, ["vision", "language", "tokenizer"], checkpoint=tmp_path)
    message = str(caught.value)
    assert "language model" in message and str(tmp_path / "language") in message
    assert "--language-model" in message and "model.bases.language_model" in message
    now, homeless = on_bases(parts, BasesConfig(language_model=str(tmp_path / "away")))
    assert homeless == [] and now.language_model is not None
    assert now.language_model.path == str(tmp_path / "away")
    require_there(now, ["vision", "language"], checkpoint=tmp_path)


def test_a_whole_model_has_no_place_for_bases(tmp_path: Path) -> None:
    whole = ModelConfig(from_checkpoint=str(tmp_path))
    now, homeless = on_bases(whole, BasesConfig(vision_tower="x", language_model="y"))
    assert now == whole and homeless == ["vision_tower", "language_model"]
    now, homeless = on_bases(whole, BasesConfig(model="z"))
    assert (now.from_checkpoint, homeless) == ("z", [])
    stands = moved(
        ModelConfig(from_checkpoint=str(tmp_path), bases=BasesConfig(vision_tower="x")),
        {"vision base": Path("z")},
    )
    assert stands.bases.vision_tower == "z"

"""What every export shares: all or nothing, and files that others may read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from tiny_parts import parts, tokenizer
from transformers import AutoTokenizer

from vistune.errors import CheckpointError
from vistune.export.files import name_class, new_directory, write_weights
from vistune.models.build import build_model
from vistune.models.facts import describe


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    config = parts(tmp_path / "parts")
    model = build_model(config, describe(config), seed=0, dtype=torch.float32)
    before = os.umask(umask)
    try:
        with new_directory(tmp_path / "out", overwrite=False) as folder:
            (folder / "inside").mkdir()
            for place in (folder, folder / "inside"):
                write_weights(place, dict(model.connector.named_parameters()))
    finally:
        os.umask(before)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [path.name for path in files] == ["model.safetensors"] * 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_failure_leaves_nothing_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_directory(out, overwrite=False) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    out.mkdir()
    (out / "kept").touch()
    with (
        pytest.raises(CheckpointError, match="something here already"),
        new_directory(out, overwrite=False),
    ):
        pass
    with new_directory(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_tokenizers_class_is_one_that_older_versions_know(tmp_path: Path) -> None:
    made = tokenizer()
    made.save_pretrained(tmp_path)
    name_class(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("a cat") == made.encode("a cat")

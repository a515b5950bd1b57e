"""MGM's public layout: read, written, told apart from its HD form, refused when wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistune.checkpoint.layouts.mgm import write_mgm
from vistune.errors import WeightsError
from vistune.models.families import FAMILIES, detect
from vistune.models.mgm import MGMForConditionalGeneration

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "mgm_gemma"


def directory(tmp_path: Path, *, run: str) -> Path:
    """A model directory as published: the settings of one run and the weights."""
    settings = json.loads((FIXTURE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **settings["runs"][run]}))
    shutil.copy(FIXTURE / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("run", "name"), [("grid1", "mgm-2b"), ("grid2", "mgm-2b-hd"), ("grid2_global", "mgm-2b-hd")]
)
def test_read_and_written_layout_is_bit_equal(tmp_path: Path, run: str, name: str) -> None:
    family = detect(directory(tmp_path, run=run), FAMILIES)
    assert family is not None
    assert family.name == name
    model = family.load(tmp_path, torch.float32)
    assert isinstance(model, MGMForConditionalGeneration)
    write_mgm(model, tmp_path / "out", dtype=torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    public = load_file(FIXTURE / "model.safetensors")
    assert written.keys() == public.keys()
    assert all(torch.equal(written[key], public[key]) for key in public)
    again = family.load(tmp_path / "out", torch.float32)
    assert isinstance(again, MGMForConditionalGeneration)
    assert again.config.to_dict() == model.config.to_dict()
    pixels = torch.randn(1, 3, model.config.image_size_aux, model.config.image_size_aux)
    ids = torch.tensor([[2, *[256] * model.grid.num_tokens(*pixels.shape[-2:]), 9]])
    with torch.no_grad():
        expected = model(ids, pixel_values=pixels).logits
        assert torch.equal(again(ids, pixel_values=pixels).logits, expected)


def test_a_loaded_model_keeps_its_head_tied_and_its_buffers(tmp_path: Path) -> None:
    family = FAMILIES.get("mgm-2b")
    model = family.load(directory(tmp_path, run="grid1"), torch.float32)
    assert isinstance(model, MGMForConditionalGeneration)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(tensor.device.type == "cpu" for tensor in [*model.buffers(), *model.parameters()])


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    family = FAMILIES.get("mgm-2b")
    tensors = load_file(directory(tmp_path, run="grid1") / "model.safetensors")
    lost = tensors.pop("model.mm_projector.2.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors are\s+missing"):
        family.load(tmp_path, torch.float32)
    tensors["model.mm_projector.2.bias"] = lost
    tensors["model.mm_projector.4.weight"] = lost.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="1 are left over"):
        family.load(tmp_path, torch.float32)

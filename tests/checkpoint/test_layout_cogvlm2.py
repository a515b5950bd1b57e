"""The public CogVLM2 layout: recognised, read strictly, written back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vistune.checkpoint.layouts.cogvlm2 import (
    from_public,
    to_public,
    to_public_config,
    write_cogvlm2,
)
from vistune.errors import ModelError, WeightsError
from vistune.models.cogvlm2 import CogVLM2Config
from vistune.models.families import FAMILIES, LANGUAGE_FAMILIES, detect
from vistune.models.families.cogvlm2 import load_cogvlm2

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "cogvlm2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the fixture that a test may damage."""
    copy = tmp_path / "any name"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, copy / name)
    return copy


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def test_directory_is_recognised_by_its_content(folder: Path) -> None:
    family = detect(folder, FAMILIES)
    assert family is not None and family.name == "cogvlm2"
    assert detect(folder, LANGUAGE_FAMILIES) is None
    assert "cogvlm2" in FAMILIES


def test_a_tower_without_visual_experts_is_not_this_family(folder: Path) -> None:
    tensors = {k: v for k, v in _tensors(folder).items() if "vision_expert" not in k}
    save_file(tensors, folder / "model.safetensors")
    assert detect(folder, FAMILIES) is None


def test_loading_takes_every_tensor_in_the_format_asked_for(folder: Path) -> None:
    model = FAMILIES.get("cogvlm2").load(folder, torch.bfloat16)
    state = model.state_dict()
    for name, tensor in _tensors(folder).items():
        assert torch.equal(state[name], tensor.bfloat16()), name
    assert not model.training
    assert not any(tensor.is_meta for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_directory_is_the_one_read(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    # Shards of 200 kB: the index is written and read as well.
    model = load_cogvlm2(folder, dtype)
    write_cogvlm2(model, tmp_path / "out", dtype=dtype, max_shard_size="200KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    public, written = _tensors(folder), _tensors(tmp_path / "out")
    assert written.keys() == public.keys()
    for name, tensor in public.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((FIXTURE / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    again = load_cogvlm2(tmp_path / "out", dtype)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_maps_are_each_others_inverse() -> None:
    tensors = _tensors(FIXTURE)
    config = CogVLM2Config(**json.loads((FIXTURE / "config.json").read_text()))
    there = from_public(tensors, config, where="here")
    back = to_public(there, config, where="here")
    assert back.keys() == tensors.keys()
    assert all(back[name] is tensors[name] for name in tensors)


def test_missing_and_left_over_tensors_are_listed(folder: Path) -> None:
    tensors = _tensors(folder)
    del tensors["model.vision.boi"]
    tensors["model.vision.extra"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_cogvlm2(folder, torch.float32)
    assert "model.vision.boi" in str(caught.value.expected)
    assert "model.vision.extra" in str(caught.value.got)


def test_another_shape_is_named(folder: Path) -> None:
    _edit(folder, intermediate_size=112)
    with pytest.raises(WeightsError, match=r"gate_proj.*\(96, 64\) instead of \(112, 64\)"):
        load_cogvlm2(folder, torch.float32)


def test_another_rotary_base_is_noticed(folder: Path) -> None:
    _edit(folder, rope_theta=10000.0)
    with pytest.raises(WeightsError, match="rotary frequencies"):
        load_cogvlm2(folder, torch.bfloat16)


def test_rotary_precision_is_the_callers_choice(folder: Path) -> None:
    model = load_cogvlm2(folder, torch.bfloat16, rotary_precision="public")
    assert model.config.rotary_precision == "public"
    assert load_cogvlm2(folder, torch.bfloat16).config.rotary_precision == "fp32"


def test_missing_shard_is_noticed(folder: Path, tmp_path: Path) -> None:
    model = load_cogvlm2(folder, torch.float32)
    write_cogvlm2(model, tmp_path / "out", dtype=torch.float32, max_shard_size="200KB")
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=gone.name):
        load_cogvlm2(tmp_path / "out", torch.float32)


def test_damaged_and_absent_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="damaged"):
        load_cogvlm2(folder, torch.float32)
    weights.unlink()
    with pytest.raises(WeightsError, match="no weight file"):
        load_cogvlm2(folder, torch.float32)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_cogvlm2(folder, torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_cogvlm2(folder, torch.float32)


def test_pytorch_files_are_read_too(folder: Path) -> None:
    tensors = _tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    family = detect(folder, FAMILIES)
    assert family is not None
    state = family.load(folder, torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_unmerged_adapters_are_not_written(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_cogvlm2(folder, torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["vision_expert_dense"]))
    with pytest.raises(WeightsError, match="lora_A"):
        write_cogvlm2(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_the_public_code_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match="rope_theta"):
        to_public_config(CogVLM2Config(rope_theta=10000.0))


def test_shards_hold_the_format_mark_transformers_asks_for(folder: Path, tmp_path: Path) -> None:
    write_cogvlm2(load_cogvlm2(folder, torch.float32), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"

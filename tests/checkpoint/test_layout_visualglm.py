"""VisualGLM's two public layouts: read, written, told apart, refused when something is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistune.checkpoint.layouts.visualglm_hf import write_visualglm_hf
from vistune.checkpoint.layouts.visualglm_sat import write_visualglm_sat
from vistune.errors import ModelError, VistuneError, WeightsError
from vistune.models.families import FAMILIES, detect
from vistune.models.families.visualglm import VisualGLMFamily, load_chatglm, read_sat_tensors
from vistune.models.visualglm import VisualGLMForConditionalGeneration

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "visualglm"


def load(directory: Path, **options: str) -> VisualGLMForConditionalGeneration:
    return VisualGLMFamily().load(directory, torch.float32, **options)  # type: ignore[arg-type]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_the_family_is_found_by_names_of_tensors() -> None:
    family = detect(FIXTURE, FAMILIES)
    assert family is not None
    assert family.name == "visualglm-6b"


def test_transformers_layout_round_trip_is_bit_equal(tmp_path: Path) -> None:
    model = load(FIXTURE)
    write_visualglm_hf(model, tmp_path, dtype=torch.float32)
    assert same(load_file(tmp_path / "model.safetensors"), load_file(FIXTURE / "model.safetensors"))
    assert same(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("qkv", ["blocks", "by_head"])
def test_sat_layout_round_trip_is_bit_equal(tmp_path: Path, qkv: str) -> None:
    model = load(FIXTURE)
    write_visualglm_sat(model, tmp_path, qkv=qkv, dtype=torch.float32)  # type: ignore[arg-type]
    loaded = load(tmp_path, sat_qkv=qkv)
    assert same(loaded.state_dict(), model.state_dict())
    tensors = read_sat_tensors(tmp_path)
    fused = tensors["transformer.layers.1.attention.query_key_value.weight"]
    query = model.state_dict()["language_model.model.layers.1.attention.q_proj.weight"]
    assert torch.equal(fused[:64], query) == (qkv == "blocks")
    assert torch.equal(fused[:16], query[:16])
    assert tensors["transformer.position_embeddings.weight"].shape == (256, 64)
    assert VisualGLMFamily().matches({}, tensors.keys())
    other = "by_head" if qkv == "blocks" else "blocks"
    assert not same(load(tmp_path, sat_qkv=other).state_dict(), model.state_dict())


def test_generation_settings_name_the_end() -> None:
    settings = load(FIXTURE).generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (305, 3)


def test_chatglm_alone(tmp_path: Path) -> None:
    tensors = load_file(FIXTURE / "model.safetensors")
    text = {k: v for k, v in tensors.items() if not k.startswith("image_encoder.")}
    save_file(text, tmp_path / "model.safetensors")
    shutil.copy(FIXTURE / "config.json", tmp_path / "config.json")
    model = load_chatglm(tmp_path, torch.float32)
    ids = torch.tensor([[20, 21, 301, 304, 30]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(FIXTURE)(ids).logits)


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    tensors = load_file(FIXTURE / "model.safetensors")
    settings = json.loads((FIXTURE / "config.json").read_text())

    def refuse(kind: type[VistuneError], message: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(kind, match=message):
            load(tmp_path)

    lost = tensors.pop("image_encoder.glm_proj.bias")
    refuse(WeightsError, "1 tensors are missing")
    tensors["image_encoder.glm_proj.bias"] = lost[:-1].clone()
    refuse(WeightsError, "another shape")
    tensors["image_encoder.glm_proj.bias"] = lost
    tensors["transformer.layers.0.attention.query_key_value.matrix_A"] = lost.clone()
    refuse(WeightsError, "1 are left over")
    del tensors["transformer.layers.0.attention.query_key_value.matrix_A"]
    settings["vocab_size"] = 130_528
    refuse(ModelError, "different vocabularies")


def test_unmerged_adapters_are_not_written(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = load(FIXTURE)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model.language_model)
    with pytest.raises(WeightsError, match="left over"):
        write_visualglm_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    try:
        from visualglm_case import train_pieces
    finally:
        sys.path.pop(0)
    from vistune.models.chatglm.tokenizer import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(str(train_pieces(tmp_path)))
    write_visualglm_hf(load(FIXTURE), tmp_path / "out", tokenizer=tokenizer)
    loaded = VisualGLMFamily().load_tokenizer(tmp_path / "out", vocab_size=320)
    assert loaded.encode("你好") == tokenizer.encode("你好")


def test_sat_directories_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="latest"):
        read_sat_tensors(tmp_path)
    (tmp_path / "latest").write_text("1")
    (tmp_path / "1").mkdir()
    with pytest.raises(WeightsError, match="not one file"):
        read_sat_tensors(tmp_path)
    (tmp_path / "1" / "mp_rank_00_model_states.pt").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="damaged"):
        read_sat_tensors(tmp_path)

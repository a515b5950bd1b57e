"""LLaVA's LoRA of a task: adapters whose base is a whole LLaVA, and the projector beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_dirs import write_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistune.assembly import load_assembled
from vistune.errors import ModelError, WeightsError
from vistune.export import export_model
from vistune.models.facts import language_family, read_text_config, read_tokenizer
from vistune.recipe import LanguageModelConfig

RANK, ALPHA = 2, 8
LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A released LLaVA, which calls itself what transformers' own is called."""
    folder = write_family("llava-1.5", tmp_path / "base")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def task(tmp_path: Path, base: Path) -> Path:
    """What `finetune_task_lora` leaves."""
    torch.manual_seed(3)
    folder = tmp_path / "task"
    folder.mkdir()
    weights = torch.load(base / "pytorch_model.bin")
    rows, columns = weights[f"{LAYER}.weight"].shape
    name = f"base_model.model.{LAYER}"
    pair = {
        f"{name}.lora_A.weight": torch.randn(RANK, columns),
        f"{name}.lora_B.weight": torch.randn(rows, RANK),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    trained = {n: t + torch.randn_like(t) for n, t in weights.items() if "mm_projector" in n}
    others = {f"base_model.model.{n}": t for n, t in trained.items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def merged(base: Path, task: Path) -> dict[str, Tensor]:
    weights = dict(torch.load(base / "pytorch_model.bin"))
    del weights["model.layers.0.self_attn.rotary_emb.inv_freq"]
    others = torch.load(task / "non_lora_trainables.bin")
    weights |= {n.removeprefix("base_model.model."): t for n, t in others.items()}
    pair = load_file(task / "adapter_model.safetensors")
    first, second = (pair[f"base_model.model.{LAYER}.lora_{half}.weight"] for half in "AB")
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"] + ALPHA / RANK * second @ first
    return weights


def test_it_is_merged_into_the_llava_it_stands_on(base: Path, task: Path, tmp_path: Path) -> None:
    out = export_model(task, to="llava", output=tmp_path / "out")
    written, expected = load_file(out / "model.safetensors"), merged(base, task)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor)
    assert not torch.equal(
        written[f"{LAYER}.weight"], torch.load(base / "pytorch_model.bin")[f"{LAYER}.weight"]
    )
    assembled = load_assembled(task)
    assert assembled.encoder.template.name == "vicuna_v1"
    assert assembled.encoder.image_plan.mode == "pad"


def test_the_language_model_of_a_llava_is_a_part(base: Path) -> None:
    config = LanguageModelConfig(path=str(base))
    family = language_family(config)
    assert family is not None and family.name == "llava-language"
    assert read_text_config(config).model_type == "llama"
    assert read_tokenizer(config)[0].convert_tokens_to_ids("</s>") == 2
    model = family.load(base, torch.float32)
    weights = torch.load(base / "pytorch_model.bin")
    state = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    assert {e.public for e in family.key_map(model.config).entries} == set(state)
    assert not any(tensor.is_meta for tensor in [*model.buffers(), *model.parameters()])
    with pytest.raises(ModelError, match="no LLaVA"):
        family.transformers_config({"architectures": ["LlamaForCausalLM"]})
    weights["model.layers.7.more"] = torch.ones(1)
    del weights["lm_head.weight"]
    torch.save(weights, base / "pytorch_model.bin")
    with pytest.raises(WeightsError) as caught:
        family.load(base, torch.float32)
    assert "lm_head.weight" in str(caught.value) and "layers.7.more" in str(caught.value)

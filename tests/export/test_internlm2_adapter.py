"""Adapters of InternLM2 under its own names: what they add is what the Llama form's add."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vistune.checkpoint.merge import merge_adapters
from vistune.errors import WeightsError
from vistune.export.internlm2_adapter import write_internlm2_adapter
from vistune.models.adapters import fold_adapter
from vistune.models.families.internlm2 import load_internlm2
from vistune.models.language.internlm2 import internlm2_keys
from vistune.models.tune.lora import adapter_layers

INTERNLM2 = Path(__file__).parents[1] / "fixtures" / "parity" / "internlm2"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
UNEVEN = {"rank_pattern": {"k_proj": 5, r"layers\.1\.self_attn\.v_proj": 2}}
CASES: dict[str, dict[str, Any]] = {
    "everything": {"target_modules": EVERYTHING},
    "everything, rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "attention": {"target_modules": ATTENTION},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "k": {"target_modules": ["k_proj"]},
    "no wqkv": {"target_modules": ["o_proj", "up_proj"]},
    "one layer": {"target_modules": EVERYTHING, "layers_to_transform": [1]},
    # Other scales too: alpha stays as it is.
    "other ranks": {"target_modules": EVERYTHING, **UNEVEN},
    "other ranks, rslora": {"target_modules": EVERYTHING, "use_rslora": True, **UNEVEN},
    "other ranks, one scale": {
        "target_modules": EVERYTHING,
        "rank_pattern": {"k_proj": 6},
        "alpha_pattern": {"k_proj": 10},
    },
    "q in one layer": {"target_modules": r".*(layers\.0\.self_attn\.q_proj|down_proj)"},
}


def adapted(case: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = load_internlm2(INTERNLM2, torch.float32)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, **CASES[case]), model)
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor["default"].weight.normal_(std=0.2)
                factor["default"].to(dtype)
    return model


def public_weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return internlm2_keys(model.config).to_public(model.state_dict(), where="test")


def of_module(module: str, patterns: dict[str, float], usual: float) -> float:
    fitting = [v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)]
    assert len(fitting) <= 1
    return fitting[0] if fitting else usual


class Public(nn.Module):
    """Modules with InternLM2's names and weights, to see where peft puts what."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            at: nn.Module = self
            *path, last = name.removesuffix(".weight").split(".")
            for part in path:
                if part not in dict(at.named_children()):
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            if weight.dim() == 1:
                module: nn.Module = nn.LayerNorm(len(weight), bias=False)
            elif last == "tok_embeddings":
                module = nn.Embedding(*weight.shape)
            else:
                module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            at.add_module(last, module)
        self.load_state_dict(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_adds_what_the_llama_forms_adapters_add(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    base = public_weights(load_internlm2(INTERNLM2, torch.float32))
    model = adapted(case, dtype)
    write_internlm2_adapter(model, base="somewhere", folder=tmp_path / "a")
    # Products of 16-bit factors in fp32, as every reader below makes them.
    for layer in adapter_layers(model).values():
        layer.float()
    merge_adapters(model)
    expected = public_weights(model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    pairs = load_file(tmp_path / "a" / "adapter_model.safetensors")

    by_hand = dict(base)
    for name in pairs:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if f"base_model.model.{module}.lora_A.weight" != name:
            continue
        first, second = pairs[name], pairs[name.replace(".lora_A.", ".lora_B.")]
        rank = of_module(module, config["rank_pattern"], config["r"])
        alpha = of_module(module, config["alpha_pattern"], config["lora_alpha"])
        assert first.shape[0] == second.shape[1] == rank
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        by_hand[f"{module}.weight"] = (
            base[f"{module}.weight"] + second.float() @ first.float() * scale
        )
    by_peft = PeftModel.from_pretrained(Public(base), str(tmp_path / "a")).merge_and_unload()
    folded = load_internlm2(INTERNLM2, torch.float32)
    fold_adapter(folded, tmp_path / "a", key="adapter", public=internlm2_keys(folded.config))
    changed = 0
    for name, weight in expected.items():
        changed += not torch.equal(weight, base[name])
        for found in (by_hand, by_peft.state_dict(), public_weights(folded)):
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    assert changed == len(pairs) // 2 > 0


def test_adapters_in_16_bit_stay_as_they_are(tmp_path: Path) -> None:
    model = adapted("q and v", torch.bfloat16)
    write_internlm2_adapter(model, base="somewhere", folder=tmp_path / "a")
    pairs = load_file(tmp_path / "a" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.attention.wqkv"
    first, second = (pairs[f"{module}.lora_{half}.weight"] for half in "AB")
    assert first.dtype == second.dtype == torch.bfloat16
    layers = adapter_layers(model)
    # 2 groups of 4 query heads, a key and a value, each of 8 rows.
    groups = second.unflatten(0, (2, 6, 8))
    for name, columns, heads in (("q", slice(0, 3), slice(0, 4)), ("v", slice(3, 6), slice(5, 6))):
        layer = layers[f"model.layers.0.self_attn.{name}_proj"]
        assert torch.equal(first[columns], layer.lora_A["default"].weight)
        found = groups[:, heads, :, columns].flatten(0, 2)
        assert torch.equal(found, layer.lora_B["default"].weight)
    assert (
        not groups[:, :4, :, 3:].any() and not groups[:, 4].any() and not groups[:, 5, :, :3].any()
    )


def test_names_are_short_where_they_can_be(tmp_path: Path) -> None:
    for case, targets, patterns in (
        ("everything", {"wqkv", "wo", "w1", "w2", "w3"}, {"wqkv": 9}),
        ("no wqkv", {"wo", "w3"}, {}),
        ("k", {"wqkv"}, {}),
        ("one layer", None, {"wqkv": 9}),
    ):
        write_internlm2_adapter(adapted(case), base="somewhere", folder=tmp_path / case)
        config = json.loads((tmp_path / case / "adapter_config.json").read_text())
        assert config["rank_pattern"] == patterns
        if targets is None:
            assert all(name.startswith("model.layers.1.") for name in config["target_modules"])
        else:
            assert set(config["target_modules"]) == targets


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    write_internlm2_adapter(adapted("attention"), base="somewhere", folder=tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"rank_pattern": {}}
    file.write_text(json.dumps(config))
    model = load_internlm2(INTERNLM2, torch.float32)
    with pytest.raises(WeightsError, match=r"wqkv(.|\n)*rank 3"):
        fold_adapter(model, tmp_path / "a", key="adapter", public=internlm2_keys(model.config))

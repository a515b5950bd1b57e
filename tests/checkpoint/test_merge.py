from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_parts import composed, packed_logits, row

from vistune.checkpoint.merge import merge_adapters, merge_and_check
from vistune.errors import CheckpointError
from vistune.models.compose import ComposedVLM
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def adapted(shelf: Path, **extra: Any) -> tuple[ComposedVLM, Any]:
    """A model whose adapters say something, in both parts that can have them."""
    model, facts = composed(shelf)
    lora = {"mode": "lora", "rank": 4, "alpha": 8.0, **extra}
    apply_tuning(model, TuneConfig.model_validate({"language": lora, "vision": lora}), seed=0)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval(), row(facts)


@pytest.mark.parametrize("extra", [{}, {"rslora": True}, {"dora": True}])
def test_merged_model_equals_the_model_with_adapters(shelf: Path, extra: dict[str, bool]) -> None:
    model, made = adapted(shelf, **extra)
    base, _ = composed(shelf)
    names = [name for name, _ in base.named_parameters()]

    def outputs() -> torch.Tensor:
        return torch.cat(packed_logits(model, made))

    plain = torch.cat(packed_logits(base, made))
    assert (outputs() - plain).abs().max() > 0.01
    check = merge_and_check(model, outputs)
    assert check.num_layers == 2 * 7 + 2 * 6
    assert check.max_abs_error < 1e-5 * max(1.0, check.max_abs_value)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(type(m) is not nn.Module for m in model.modules())
    assert merge_adapters(model) == 0


def test_16_bit_weights_are_rounded_once(shelf: Path) -> None:
    model, _ = adapted(shelf)
    model.to(torch.bfloat16)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    )
    merge_adapters(model)
    merged = model.language_model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype is torch.bfloat16
    # One rounding to 8 bits of precision, and nothing else.
    assert (merged.float() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_a_merge_that_changes_answers_is_refused(shelf: Path) -> None:
    model, made = adapted(shelf)
    calls = []

    def outputs() -> torch.Tensor:
        calls.append(None)
        logits = torch.cat(packed_logits(model, made))
        return logits if len(calls) == 1 else logits + 1.0

    with pytest.raises(CheckpointError, match="answers differently"):
        merge_and_check(model, outputs)

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_parts import composed, row

from vistune.device import Device
from vistune.errors import VistuneError
from vistune.models.compose import ComposedVLM
from vistune.models.recompute import layers_of
from vistune.models.tune import apply_tuning
from vistune.recipe import Recipe
from vistune.train.engine import set_up_engine

CPU = Device(torch.device("cpu"), "test", torch.float32)
LORA = {"language": {"mode": "lora", "rank": 2}}
BOTH = {**LORA, "vision": {"mode": "full"}}


def set_up(
    folder: Path, tune: dict[str, Any], **train: Any
) -> tuple[ComposedVLM, dict[str, Any], str, Any]:
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"vision_tower": {"path": "v"}, "language_model": {"path": "l"}},
            "data": {"train": [{"path": "d.json"}]},
            "batch": {"samples": 1},
            "tune": tune,
            "train": {"steps": 1, **train},
        }
    )
    model, facts = composed(folder)
    apply_tuning(model, recipe.tune, seed=0)
    console = Console(file=io.StringIO(), record=True, width=200)
    engine = set_up_engine(model, recipe, CPU, console)
    return model, engine, console.export_text(), row(facts)


def test_every_choice_is_said_and_returned(tmp_path: Path) -> None:
    _, engine, said, _ = set_up(tmp_path, LORA)
    assert said.splitlines() == [
        "attention, language model: sdpa (one call for each sample, on any device)",
        "attention, vision tower: sdpa (images of one size are a plain batch)",
        "decoder layers: transformers' own",
        "kernels: torch (Triton does not run on cpu)",
    ]
    assert engine["attention"]["language"]["name"] == "sdpa"
    assert engine["kernels"] == {"name": "torch", "reason": "Triton does not run on cpu"}
    assert engine["compiled"] == engine["offload"] == ""


@pytest.mark.parametrize(
    "changes, hinted",
    [
        ({}, True),
        ({"fused": "on"}, False),
        ({"checkpoint_layers": 1, "offload": {"activations": True}}, False),
    ],
)
def test_compiled_blocks_are_suggested_where_they_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], hinted: bool
) -> None:
    monkeypatch.setattr("vistune.train.engine.has_triton", lambda _: True)
    _, engine, said, _ = set_up(tmp_path, LORA, **changes)
    assert ("train.compile=blocks" in said) is hinted
    assert engine["compiled"] == ""


@pytest.mark.parametrize("fused", ["on", "off"])
def test_settings_reach_the_layers(tmp_path: Path, fused: str) -> None:
    model, engine, said, made = set_up(
        tmp_path,
        BOTH,
        fused=fused,
        attention="sdpa",
        checkpoint_layers=1,
        checkpoint_tower_layers=1,
        offload={"activations": True},
    )
    assert "inputs of 1 recomputed layers" in said and engine["offload"]
    assert [b.gradient_checkpointing for b in layers_of(model, "vision")] == [True, False]
    if fused == "on":
        assert model.fused is not None and model.fused.num_recomputed == 1
        assert model.fused.backend.name == "sdpa" and model.fused.store is not None
        assert "fused layers bring their own" in said
    else:
        assert [b.gradient_checkpointing for b in layers_of(model, "language")] == [True, False]
    model.logits(model.hidden_states(**made.packed)[0]).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("train", "where"),
    [
        ({"attention": "varlen"}, "train.attention"),
        ({"kernels": "liger"}, "train.kernels"),
        ({"kernels": "liger", "fused": "on"}, "train.kernels"),
        ({"compile": "static_blocks", "fused": "on"}, "train.compile"),
        ({"checkpoint_layers": 9}, "train.checkpoint_layers"),
    ],
)
def test_what_cannot_be_had_is_an_error(tmp_path: Path, train: dict[str, Any], where: str) -> None:
    with pytest.raises(VistuneError) as raised:
        set_up(tmp_path, LORA, **train)
    assert raised.value.where == where

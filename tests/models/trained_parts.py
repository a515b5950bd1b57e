"""Tiny checkpoints whose trained weights say something, and what they answer. Not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_parts import encoder, packed_logits, row
from torch import Tensor

from vistune._version import __version__
from vistune.checkpoint.manifest import Manifest
from vistune.checkpoint.merge import merge_adapters
from vistune.checkpoint.save import CheckpointContent, save_checkpoint
from vistune.models.build import build_model
from vistune.models.compose import ComposedVLM
from vistune.models.facts import describe
from vistune.models.tune import apply_tuning, trainable_state
from vistune.recipe import ModelConfig, TuneConfig

LORA = {"mode": "lora", "rank": 2, "alpha": 3.0}


def trained(
    config: ModelConfig, folder: Path, tune: dict[str, Any], *, template: Any = None
) -> list[Tensor]:
    """Writes a checkpoint whose trained weights say something; returns its logits."""
    facts = describe(config)
    model = build_model(config, facts, seed=5, dtype=torch.float32)
    apply_tuning(model, TuneConfig.model_validate(tune), seed=5)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    content = CheckpointContent(
        step=1,
        weights=trainable_state(model),
        trainer={},
        manifest=Manifest(
            vistune_version=__version__,
            kind="checkpoint",
            parts=config,
            tune=TuneConfig.model_validate(tune).model_dump(mode="json"),
            seed=5,
            encoder=encoder(facts, template).to_state(),
            step=1,
        ),
        inherited={},
    )
    save_checkpoint(folder, content, keep=1)
    merge_adapters(model)
    return logits(model.eval(), config)


@torch.no_grad()
def logits(model: Any, config: ModelConfig) -> list[Tensor]:
    assert isinstance(model, ComposedVLM)
    return packed_logits(model, row(describe(config)))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    # An adapter is folded in by another route: the same sums in another order.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

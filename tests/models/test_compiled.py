from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_parts import composed, row

from vistune.errors import ModelError
from vistune.models.attention.install import install_attention
from vistune.models.compiled import compile_blocks
from vistune.models.fused.install import install_fused
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig


@pytest.mark.parametrize(("fused", "recomputed"), [(False, 0), (False, 1), (True, 0), (True, 1)])
def test_compiled_blocks_give_the_same(tmp_path: Path, fused: bool, recomputed: int) -> None:
    """By torch's tracer without code generation, which takes a minute on a CPU."""
    results = []
    for compiled in (False, True):
        model, facts = composed(tmp_path)
        lora = {"language": {"mode": "lora", "rank": 2}}
        apply_tuning(model, TuneConfig.model_validate(lora), seed=0)
        model.train()
        set_checkpoint_layers(model, recomputed)
        install_fused(model, mode="on" if fused else "off", fp8=False, num_recomputed=recomputed)
        if compiled:
            install_attention(
                model, wanted="auto", dtype=torch.float32, device=torch.device("cpu"), opaque=True
            )
            name = model.language_model.config._attn_implementation
            assert name == "vistune_packed_each_opaque"
            said = compile_blocks(model, mode="blocks", fused=fused, backend="eager")
            blocks = "2 tower blocks; rows of any length"
            assert said == f"compiled: {'' if fused else '2 decoder layers, '}{blocks}"
        hidden = model.hidden_states(**row(facts).packed)
        hidden.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((hidden.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4)


def test_padding_for_nothing_is_refused(tmp_path: Path) -> None:
    model, _ = composed(tmp_path)
    with pytest.raises(ModelError, match="run fused"):
        compile_blocks(model, mode="static_blocks", fused=True)
    with pytest.raises(ModelError, match="own attention does not take"):
        compile_blocks(model, mode="static_blocks", fused=False, attention="own")
    with pytest.raises(ModelError, match="compiled by itself"):
        compile_blocks(model, mode="blocks", fused=False, attention="flex")

"""A head tied to the input embeddings carries no adapter: merging one would change both."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_parts import composed

from vistune.checkpoint.merge import merge_adapters
from vistune.models.tune import apply_tuning
from vistune.models.tune.lora import adapter_layers
from vistune.recipe.schema import LoraTune, TuneConfig


def test_merging_leaves_tied_embeddings_alone(tmp_path: Path) -> None:
    model, _ = composed(tmp_path, text="llama_tied")
    apply_tuning(model, TuneConfig(language=LoraTune(mode="lora", rank=2)), seed=0)
    names = set(adapter_layers(model))
    assert names
    assert not any("lm_head" in name for name in names)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    embeddings = model.language_model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    ids = torch.tensor([[5, 9, 30, 7]])
    logits = model(input_ids=ids).logits.detach()
    assert merge_adapters(model) == len(names)
    assert torch.equal(embeddings, before)
    # fp32 rounding of another order of summation.
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)

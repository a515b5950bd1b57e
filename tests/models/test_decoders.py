"""Decoders beyond the proved ones: a packed row means the same, windows included, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vistune import _compat
from vistune.errors import ModelError
from vistune.models.attention import packing_mask
from vistune.models.language.decoder import load_language_model, logits_of
from vistune.recipe import LanguageModelConfig

WINDOW = 4
LENGTHS = [17, 9, 12]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that attention differs visibly from an average
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


def load(folder: Path, kind: str, **changes: Any) -> tuple[Any, Any]:
    """Returns a model as transformers makes it, and as it is loaded here."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(folder)
    text_config = transformers.AutoConfig.from_pretrained(folder)
    asked = LanguageModelConfig(path=str(folder))
    ours, _ = load_language_model(asked, text_config, dtype=torch.float32)
    return theirs.eval(), ours


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Starcoder2", {"sliding_window": WINDOW}),
        ("Ministral", {"sliding_window": WINDOW, "head_dim": 8}),
        ("Olmo3", {"sliding_window": WINDOW}),
        ("Cohere2", {"sliding_window": WINDOW}),
        ("SmolLM3", {"sliding_window": WINDOW, "use_sliding_window": True}),
        ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}),
        ("Qwen3Moe", {"head_dim": 8, **EXPERTS}),
        ("Glm4", {"head_dim": 8}),
    ],
)
@torch.no_grad()
def test_a_packed_row_is_its_samples(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    theirs, ours = load(tmp_path, kind, **changes)
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    parts = torch.split(ids, LENGTHS, dim=1)
    expected = torch.cat([theirs(input_ids=part).logits[0] for part in parts])
    hidden = _compat.decoder_of(ours)(
        inputs_embeds=ours.get_input_embeddings()(ids),
        attention_mask=packing_mask(torch.tensor([0, *LENGTHS]).cumsum(0), max(LENGTHS)),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        use_cache=False,
    ).last_hidden_state[0]
    # fp32 sums in another order.
    torch.testing.assert_close(logits_of(ours)(hidden), expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_attention_is_not_told_is_refused(tmp_path: Path) -> None:
    experts = {"num_local_experts": 2}
    with pytest.raises(ModelError, match="slides a window of 4 positions") as raised:
        load(tmp_path / "a", "Phimoe", sliding_window=WINDOW, **experts)
    assert "2 of 2 layers" in str(raised.value)
    # One that no sample can reach leaves nothing out.
    load(tmp_path / "b", "Phimoe", sliding_window=256, **experts)
    load(tmp_path / "c", "Phimoe", sliding_window=None, **experts)


def test_a_decoder_that_fails_on_a_packed_row_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not run on a packed row"):
        load(tmp_path, "Doge")

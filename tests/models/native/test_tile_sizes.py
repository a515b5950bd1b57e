"""Real sizes without storage: as many weights as published, each with a role."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from vistune.models.facts import ModelFacts
from vistune.models.native import native_skeleton

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
BASE |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SO400M |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}


def smolvlm(vision: dict[str, int], scale: int, text: dict[str, int]) -> Any:
    return transformers.SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 49280,
            "tie_word_embeddings": False,
            **text,
        },
        vision_config=dict(vision),
        scale_factor=scale,
        tie_word_embeddings=False,
    )


PUBLISHED: dict[str, tuple[Any, int]] = {
    "SmolVLM-256M": (
        smolvlm(
            BASE,
            4,
            {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            | {"num_attention_heads": 9, "num_key_value_heads": 3},
        ),
        256_484_928,
    ),
    "SmolVLM-500M": (
        smolvlm(
            BASE,
            4,
            {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
            | {"num_attention_heads": 15, "num_key_value_heads": 5},
        ),
        507_482_304,
    ),
    "SmolVLM2-2.2B": (
        smolvlm(
            SO400M,
            3,
            {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
            | {"num_attention_heads": 32, "num_key_value_heads": 32},
        ),
        2_246_784_880,
    ),
    "Mistral-Small-3.1-24B": (
        transformers.Mistral3Config(tie_word_embeddings=False),
        24_011_361_280,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name: str) -> None:
    config, expected = PUBLISHED[name]
    facts = ModelFacts(
        tokenizer=None,
        image_token_id=0,
        grid=None,  # type: ignore[arg-type]
        image_defaults=None,  # type: ignore[arg-type]
        vision_config=None,
        text_config=None,
        tower=None,
        whole_config=config,
    )
    with torch.device("meta"):
        model = native_skeleton(facts)
    roles = {n: model.module_map.role_of(n) for n, _ in model.named_parameters()}
    assert set(roles.values()) == {"vision", "connector", "language", "head"}
    assert sum(p.numel() for p in model.parameters()) == expected
    assert not model.never_trained

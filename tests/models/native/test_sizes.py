"""Real sizes without storage: as many weights as published, and operations counted at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from vistune.models.facts import ModelFacts
from vistune.models.flops import RowLengths, row_flops, work_of
from vistune.models.native import native_skeleton
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig

TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Qwen2-VL-2B": (
        "Qwen2VLConfig",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
        {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        2_208_985_600,
    ),
    "Qwen2.5-VL-3B": (
        "Qwen2_5_VLConfig",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
        {**TOWER, "out_hidden_size": 2048},
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B": (
        "Qwen2_5_VLConfig",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        {**TOWER, "out_hidden_size": 3584},
        8_292_166_656,
    ),
    "Qwen3-VL-4B": (
        "Qwen3VLConfig",
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
        | {"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
        4_437_815_808,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name: str) -> None:
    kind, text, vision, expected = PUBLISHED[name]
    tied = {"tie_word_embeddings": name != "Qwen2.5-VL-7B"}
    config = getattr(transformers, kind)(text_config={**text, **tied}, vision_config=vision, **tied)
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
    tune = TuneConfig.model_validate({"language": {"mode": "lora", "rank": 8}})
    with torch.device("meta"):
        model = native_skeleton(facts).to(torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == expected
        apply_tuning(model, tune, seed=0)
    work = work_of(model, tune)
    assert work is not None
    row = RowLengths(
        samples=(1396,),
        num_targets=50,
        num_images=1,
        num_image_tokens=1296,
        pixel_shape=(72 * 72, 1176),
        image_shapes=((1, 72, 72),),
    )
    # Forward and input gradient of the language model, without its embeddings.
    language = row_flops(work, row).language
    rows, width = text["vocab_size"], text["hidden_size"]
    weights = sum(p.numel() for n, p in model.named_parameters() if "language_model" in n)
    assert language == pytest.approx(4 * 1396 * (weights - rows * width), rel=0.02)

"""VisualGLM's settings from and to the public files; the two vocabularies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from visualglm_case import FIXTURE, load_config

from vistune.errors import ModelError
from vistune.models.chatglm import ChatGLMConfig
from vistune.models.visualglm import VisualGLMConfig


def public() -> dict[str, Any]:
    settings = json.loads((FIXTURE / "config.json").read_text())
    assert isinstance(settings, dict)
    return settings


def test_public_settings_come_back() -> None:
    settings = public()
    written = load_config().to_public()
    assert {name: written[name] for name in settings} == settings


def test_the_residuals_factor_of_the_public_code_at_another_depth() -> None:
    # It takes 28 layers whatever the config says; a dump made with it says so.
    config = VisualGLMConfig.from_public({**public(), "residual_num_layers": 28}, where="config")
    assert config.text_config.residual_scale == 56**0.5
    assert config.to_public()["residual_num_layers"] == 28
    assert "residual_num_layers" not in load_config().to_public()


def test_saved_settings_come_back(tmp_path: Any) -> None:
    config = load_config()
    config.save_pretrained(tmp_path)
    loaded = VisualGLMConfig.from_pretrained(tmp_path)
    assert loaded.text_config.residual_scale == config.text_config.residual_scale == 6**0.5
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert loaded.qformer_config.to_dict() == config.qformer_config.to_dict()
    assert (loaded.image_token_id, loaded.num_query_tokens) == (320, 8)


def test_defaults_are_the_public_model() -> None:
    config = VisualGLMConfig()
    text = config.text_config
    assert text.residual_scale == pytest.approx(56**0.5)
    assert (text.vocab_size, text.num_image_tokens) == (130_528, 0)
    assert ChatGLMConfig(vocab_size=150_528).num_image_tokens == 20_000
    assert config.qformer_config.hidden_dropout_prob == 0.0


@pytest.mark.parametrize(("vocab_size", "sop"), [(130_528, 130_004), (150_528, 150_004)])
def test_sat_settings_are_completed_from_the_vocabulary(vocab_size: int, sop: int) -> None:
    settings = public()
    sat = {
        "model_class": "VisualGLMModel",
        "num_layers": 28,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "vocab_size": vocab_size,
        "max_sequence_length": 2048,
        "pre_seq_len": 8,
        "eva_args": settings["eva_config"],
        "qformer_args": settings["qformer_config"],
    }
    text = VisualGLMConfig.from_public(sat, where="model_config.json").text_config
    assert (text.bos_token_id, text.gmask_token_id) == (sop, sop - 3)
    assert text.pad_token_id == (3 if vocab_size == 130_528 else 20_003)
    assert text.intermediate_size == 16_384
    with pytest.raises(ModelError, match="special ids"):
        VisualGLMConfig.from_public({**sat, "vocab_size": 999}, where="model_config.json")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("eva_config", {"layernorm_order": "post"}, "pre-norm"),
        ("eva_config", {"image_size": [56, 70]}, "not square"),
        ("qformer_config", {"is_decoder": [True] * 4}, "every second layer"),
        (None, {"position_encoding_2d": False}, "one-dimensional"),
        (None, {"pre_seq_len": 4}, "p-tuning"),
        (None, {"num_layers": None}, "lacks"),
        (None, {"eva_config": None}, "does not describe"),
    ],
)
def test_other_variants_are_refused(part: str | None, change: dict[str, Any], message: str) -> None:
    settings = public()
    target = settings if part is None else settings[part]
    target.update(change)
    for name in [name for name, value in change.items() if value is None]:
        del target[name]
    with pytest.raises(ModelError, match=message):
        VisualGLMConfig.from_public(settings, where="config.json")

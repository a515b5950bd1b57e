"""Dequantisation of a toy ONNX export, and the directories that conversion writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, LlamaConfig

from vistune.errors import WeightsError
from vistune.models.towers.efficientnet_lite import EfficientNetLiteModel
from vistune.quickstart.convert import (
    dequantize_onnx,
    language_model_from_onnx,
    preprocessor_fields,
    vision_tower_from_state_dict,
)

onnx = pytest.importorskip("onnx", reason="the quickstart extra is not installed")

CONFIG = LlamaConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
)


def quantise(weight: np.ndarray, zero_point: int, dtype: type) -> tuple[np.ndarray, np.float32]:
    """Per-tensor quantisation with the given zero point; exact for the weights used here."""
    scale = np.float32(1 / 64)
    return np.round(weight / scale + zero_point).astype(dtype), scale


def toy_export(
    weights: dict[str, np.ndarray], *, drop: str = "", rename: str = ""
) -> onnx.ModelProto:
    """A graph with the names and the layout of a dynamically quantised Llama export."""
    from onnx import helper, numpy_helper

    stored, nodes = [], []

    def store(name: str, value: object) -> None:
        stored.append(numpy_helper.from_array(np.asarray(value), name))

    for number, (key, weight) in enumerate(weights.items()):
        if key == drop:
            continue
        if key.endswith("norm.weight"):
            store(key, weight)
        elif key == "model.embed_tokens.weight":
            integers, scale = quantise(weight, 128, np.uint8)
            store(f"{key}_quantized", integers)
            store(f"{key}_scale", scale)
            store(f"{key}_zero_point", np.uint8(128))
            inputs = ["gathered", f"{key}_scale", f"{key}_zero_point"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, ["embedded"]))
        else:
            base = f"onnx::MatMul_{number}"
            integers, scale = quantise(weight.T, 3, np.int8)
            store(f"{base}_quantized", integers)
            store(f"{base}_scale", scale)
            store(f"{base}_zero_point", np.int8(3))
            path = "/" + key.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
            inputs = ["x", f"{base}_quantized", "x_zero_point", f"{base}_zero_point"]
            nodes.append(
                helper.make_node(
                    "MatMulInteger", inputs, [f"y{number}"], name=f"{rename or path}/MatMul_quant"
                )
            )
    return helper.make_model(helper.make_graph(nodes, "toy", [], [], stored))


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    found = {}
    for key, value in model.state_dict().items():
        # Multiples of the quantisation step, so that recovery must be exact.
        found[key] = (rng.integers(-60, 60, tuple(value.shape)) / 64).astype(np.float32)
    return found


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    folder = tmp_path / "source"
    (folder / "onnx").mkdir(parents=True)
    onnx.save(toy_export(weights), str(folder / "onnx" / "model_quantized.onnx"))
    (folder / "config.json").write_text(CONFIG.to_json_string())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


def test_dequantised_weights_are_the_ones_that_were_quantised(
    weights: dict[str, np.ndarray],
) -> None:
    found = dequantize_onnx(toy_export(weights))
    assert found.keys() == weights.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), weights[key], err_msg=key)


def test_the_written_directory_loads_and_computes_with_these_weights(
    source: Path, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    destination = tmp_path / "model"
    destination.mkdir()
    language_model_from_onnx(source, destination)
    loaded = AutoModelForCausalLM.from_pretrained(destination)
    assert loaded.dtype == torch.float32
    embedding = weights["model.embed_tokens.weight"]
    np.testing.assert_array_equal(loaded.lm_head.weight.detach().numpy(), embedding)
    up = weights["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(loaded.model.layers[0].mlp.up_proj.weight.detach().numpy(), up)
    assert json.loads((destination / "tokenizer_config.json").read_text()) == {"chat_template": "x"}


def test_a_missing_weight_is_named(
    source: Path, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    key = "model.layers.0.mlp.down_proj.weight"
    onnx.save(toy_export(weights, drop=key), str(source / "onnx" / "model_quantized.onnx"))
    with pytest.raises(WeightsError, match="1 weights are missing") as refused:
        language_model_from_onnx(source, tmp_path)
    assert refused.value.got == key


def test_a_product_of_no_layer_is_refused(weights: dict[str, np.ndarray]) -> None:
    with pytest.raises(WeightsError, match="belongs to no layer"):
        dequantize_onnx(toy_export(weights, rename="/somewhere"))


def test_preprocessing_is_x_minus_127_over_128(tmp_path: Path) -> None:
    from PIL import Image

    fields = preprocessor_fields(32)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    found = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    wanted = (pixels.transpose(2, 0, 1).astype(np.float64) - 127) / 128
    # float32 rounding of x / 255 and of the two constants
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_tower_of_another_shape_is_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError):
        vision_tower_from_state_dict(
            tmp_path / "weights.pth", tmp_path, feature_maps=("head",), image_size_px=64
        )


def test_a_converted_tower_loads(tmp_path: Path, released_lite0: dict[str, torch.Tensor]) -> None:
    torch.save(released_lite0, tmp_path / "weights.pth")
    destination = tmp_path / "tower"
    destination.mkdir()
    vision_tower_from_state_dict(
        tmp_path / "weights.pth", destination, feature_maps=("head",), image_size_px=64
    )
    tower = EfficientNetLiteModel.from_pretrained(destination)
    assert tower.config.image_size == 64
    assert tower(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 4, 1280)
    assert (destination / "preprocessor_config.json").is_file()

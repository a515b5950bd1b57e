"""EfficientNet-Lite: numbers of the public implementation, shapes, folding, save and load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vistune.errors import ModelError, WeightsError
from vistune.models.towers.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    import_weights,
)

GOLDEN = Path(__file__).parent / "efficientnet_lite0_golden.json"
TINY_STAGES = [[3, 1, 1, 4, 1], [3, 2, 2, 6, 1], [5, 2, 2, 8, 2], [3, 2, 2, 8, 1], [5, 2, 2, 8, 1]]


def tiny_config(**changes: object) -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(
        image_size=64, stem_channels=4, head_channels=12, stages=TINY_STAGES, **changes
    )


def wave(shape: tuple[int, ...], number: int) -> Tensor:
    """Values in [-1, 1] that need no random generator, so they never change."""
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391 + number).reshape(shape)


def released_weights(config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """A state dict in the layout of the public release, filled with `wave`."""
    tensors: dict[str, Tensor] = {}

    def conv(name: str, shape: tuple[int, int, int, int]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"{name}.weight"] = wave(shape, len(tensors)) * math.sqrt(4 / fan_in)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * wave((width,), len(tensors))
        tensors[f"{name}.bias"] = 0.1 * wave((width,), len(tensors))
        tensors[f"{name}.running_mean"] = 0.1 * wave((width,), len(tensors))
        tensors[f"{name}.running_var"] = 1 + 0.5 * wave((width,), len(tensors))
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(1)

    width = config.stem_channels
    conv("_conv_stem", (width, 3, 3, 3))
    norm("_bn0", width)
    number = 0
    for kernel, _, expansion, num_out, repeats in config.stages:
        for _ in range(repeats):
            name, wide = f"_blocks.{number}", width * expansion
            if expansion > 1:
                conv(f"{name}._expand_conv", (wide, width, 1, 1))
                norm(f"{name}._bn0", wide)
            conv(f"{name}._depthwise_conv", (wide, 1, kernel, kernel))
            norm(f"{name}._bn1", wide)
            conv(f"{name}._project_conv", (num_out, wide, 1, 1))
            norm(f"{name}._bn2", num_out)
            width, number = num_out, number + 1
    conv("_conv_head", (config.head_channels, width, 1, 1))
    norm("_bn1", config.head_channels)
    tensors["_fc.weight"] = wave((5, config.head_channels), 0)
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def test_full_trunk_reproduces_the_public_implementation() -> None:
    golden = json.loads(GOLDEN.read_text())
    config = EfficientNetLiteConfig(normalize=False)
    model = EfficientNetLiteModel(config)
    model.load_state_dict(import_weights(released_weights(config), config=config))
    pixels = wave((1, 3, 96, 64), 3).float()
    with torch.no_grad():
        features = model(pixels).last_hidden_state
    assert features.shape == (1, 6, 1280)
    # Values reach 6; folding the normalisation moves float32 rounding by about 1e-5.
    torch.testing.assert_close(
        features[0, :, ::97], torch.tensor(golden["features"]), rtol=0, atol=2e-4
    )
    assert features.mean().item() == pytest.approx(golden["mean"], abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (160, 32)])
def test_patches_are_rows_of_32_pixel_cells(height: int, width: int) -> None:
    model = EfficientNetLiteModel(tiny_config())
    output = model(torch.zeros(2, 3, height, width)).last_hidden_state
    assert output.shape == (2, height // 32 * (width // 32), 12)
    assert output.is_contiguous()


def test_patch_order_is_row_major() -> None:
    torch.manual_seed(0)
    model = EfficientNetLiteModel(tiny_config(normalize=False))
    blank = torch.zeros(1, 3, 320, 320)
    marked = blank.clone()
    marked[:, :, 16:18, 272:274] = 5.0  # row 0, column 8 of a 10 x 10 grid
    with torch.no_grad():
        change = (model(marked).last_hidden_state - model(blank).last_hidden_state).abs().sum(-1)
    assert int(change.argmax()) == 8


def test_several_feature_maps_keep_the_number_of_patches() -> None:
    config = tiny_config(feature_maps=("stage3", "head"))
    # stage3 has 8 channels at one cell per 8 pixels, folded 4 x 4.
    assert config.hidden_size == 8 * 16 + 12
    output = EfficientNetLiteModel(config)(torch.randn(1, 3, 64, 64)).last_hidden_state
    assert output.shape == (1, 4, config.hidden_size)


def test_normalised_features_have_mean_zero_and_variance_one() -> None:
    config = tiny_config()
    model = EfficientNetLiteModel(config)
    model.load_state_dict(import_weights(released_weights(config), config=config))
    with torch.no_grad():
        features = model(wave((2, 3, 64, 64), 1).float()).last_hidden_state
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    # The small constant under the root keeps the variance a little below 1.
    torch.testing.assert_close(
        features.var(-1, unbiased=False), torch.ones(2, 4), rtol=0, atol=0.01
    )


def test_training_mode_changes_nothing() -> None:
    model = EfficientNetLiteModel(tiny_config())
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        model.train()(pixels).last_hidden_state,
        model.eval()(pixels).last_hidden_state,
        rtol=0,
        atol=0,
    )


def test_save_and_load_give_equal_features(tmp_path: Path) -> None:
    config = tiny_config(feature_maps=("stage2", "head"))
    model = EfficientNetLiteModel(config)
    model.load_state_dict(import_weights(released_weights(config), config=config))
    model.save_pretrained(tmp_path)
    loaded = EfficientNetLiteModel.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == config.hidden_size
    pixels = wave((1, 3, 64, 64), 1).float()
    torch.testing.assert_close(
        loaded(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=0
    )


def test_every_weight_gets_a_gradient_when_unfrozen() -> None:
    model = EfficientNetLiteModel(tiny_config())
    model(torch.randn(2, 3, 64, 64)).last_hidden_state.pow(3).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []


def test_an_image_off_the_grid_is_refused() -> None:
    with pytest.raises(ModelError, match="32 pixels"):
        EfficientNetLiteModel(tiny_config())(torch.zeros(1, 3, 60, 64))


def test_an_unknown_feature_map_is_refused_by_name() -> None:
    with pytest.raises(ModelError) as refused:
        tiny_config(feature_maps=("stage9",))
    assert refused.value.got == "stage9"
    assert "stage5" in str(refused.value.expected)


def test_missing_and_left_over_tensors_are_refused() -> None:
    config = tiny_config()
    tensors = released_weights(config)
    short = {key: value for key, value in tensors.items() if key != "_bn1.running_var"}
    with pytest.raises(WeightsError, match="missing"):
        import_weights(short, config=config)
    with pytest.raises(WeightsError, match="left over"):
        import_weights({**tensors, "_extra.weight": torch.zeros(1)}, config=config)

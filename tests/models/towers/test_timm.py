"""A timm backbone as the vision tower. Runs where timm is installed (the extra `timm`)."""

import json

import pytest
import torch

timm = pytest.importorskip("timm")

from safetensors.torch import save_file  # noqa: E402
from tiny_parts import write_language  # noqa: E402

from vistune.models.build import build_model  # noqa: E402
from vistune.models.facts import describe  # noqa: E402
from vistune.recipe import ModelConfig  # noqa: E402

TOWERS = {"test_vit": (160, 100), "test_resnet": (160, 25), "test_convnext": (160, 25)}


def write_timm(folder, architecture):
    """Writes a hub directory of a random timm model as timm itself saves it."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False)
    cfg = model.pretrained_cfg
    folder.mkdir()
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "input_size": list(cfg["input_size"]),
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
            "interpolation": cfg["interpolation"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


@pytest.mark.parametrize("architecture", TOWERS)
def test_a_timm_backbone_is_a_tower(architecture, tmp_path):
    side, num_tokens = TOWERS[architecture]
    reference = write_timm(tmp_path / "tower", architecture)
    language = write_language(tmp_path / "llm")
    config = ModelConfig.model_validate(
        {
            "vision_tower": {"path": str(tmp_path / "tower")},
            "language_model": {"path": str(language)},
        }
    )
    facts = describe(config)
    assert facts.image_defaults.size_px == side
    assert facts.grid.num_tokens(side, side) == num_tokens
    model = build_model(config, facts, seed=0, dtype=torch.float32)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = reference.forward_features(pixels)
        if features.dim() == 4:
            features = features.flatten(2).transpose(1, 2)
        else:
            features = features[:, reference.num_prefix_tokens :]
        expected = model.connector(features)
        found = model.image_features(pixels)
    assert found.shape == (2, num_tokens, model.config.text_config.hidden_size)
    # the same weights through another wrapper
    assert torch.allclose(found, expected, atol=1e-5)

"""S2: features at several scales, against a plain independent form of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_parts import SIZE_PX, WIDTH, parts, vision_model

from vistune.errors import ModelError, RecipeError
from vistune.models.build import build_model
from vistune.models.facts import describe
from vistune.models.towers.families import plan_tower, tower_features, tower_grid
from vistune.recipe import ModelConfig

SCALES = (SIZE_PX, 2 * SIZE_PX, 3 * SIZE_PX)


def plainly(images: Tensor, scales: tuple[int, ...]) -> Tensor:
    """One image and one square at a time, through transformers' own hidden states."""
    tower = vision_model("clip")
    rows = []
    for image in images:
        joined = []
        for side in scales:
            at_side = F.interpolate(image[None], size=(side, side), mode="bicubic")
            cuts = side // scales[0]
            lines = []
            for y in range(cuts):
                line = []
                for x in range(cuts):
                    window = at_side[
                        ...,
                        y * scales[0] : (y + 1) * scales[0],
                        x * scales[0] : (x + 1) * scales[0],
                    ]
                    states = tower(window, output_hidden_states=True).hidden_states[-2][0, 1:]
                    line.append(states.T.reshape(-1, 2, 2))
                lines.append(torch.cat(line, dim=2))
            grid = torch.cat(lines, dim=1)
            joined.append(F.adaptive_avg_pool2d(grid, (2, 2)))
        rows.append(torch.cat(joined).flatten(1).T)
    return torch.stack(rows)


def test_features_are_those_of_the_plain_form() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, SCALES[-1], SCALES[-1])
    plan, config = plan_tower(
        vision_model("clip").config, layer=-2, select="patch", where="x", scales=SCALES
    )
    tower = vision_model("clip", num_hidden_layers=config.num_hidden_layers)
    tower.load_state_dict(vision_model("clip").state_dict(), strict=False)
    tower.set_submodule("post_layernorm", torch.nn.Identity())
    with torch.no_grad():
        found, expected = tower_features(tower, plan, images), plainly(images, SCALES)
    assert found.shape == expected.shape == (2, 4, 3 * 24)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    grid = tower_grid(config, plan, pixel_shuffle=1, where="x")
    assert grid.num_tokens(SCALES[-1], SCALES[-1]) == 4


def test_the_connector_is_as_wide_and_all_of_it_trains(tmp_path: Path) -> None:
    config = parts(tmp_path, tower={"s2": SCALES})
    facts = describe(config)
    assert facts.image_defaults.size_px == SCALES[-1] == facts.grid.fixed_size_px
    model = build_model(config, facts, seed=0, dtype=torch.float32)
    out = model.image_features(torch.randn(1, 3, SCALES[-1], SCALES[-1]))
    assert out.shape == (1, 4, WIDTH)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not [name for name in missing if not name.startswith("language_model.")]
    with pytest.raises(ModelError, match="largest scale"):
        model.image_features(torch.randn(1, 3, SIZE_PX, SIZE_PX))


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        ({"s2": [14, 28]}, "what the tower takes"),
        ({"s2": [28, 70]}, "multiple"),
        ({"s2": [28, 56], "select": "cls_patch"}, "class token"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, tower: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        describe(parts(tmp_path, tower=tower))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_tower": {"path": "v", "s2": [28]}}, "at least two"),
        ({"vision_tower": {"path": "v", "s2": [56, 28]}}, "smallest first"),
        ({"vision_tower": {"path": "v", "s2": [28, 56]}, "tiles": {}}, "do not go together"),
        ({"vision_tower": {"path": "v", "select": "cls_patch"}, "tiles": {}}, "class token"),
        ({"vision_tower": {"path": "v"}, "tiles": {"grids": []}}, "at least one grid"),
        ({"vision_tower": {"path": "v"}, "tiles": {"grids": [[1, 2], [1, 2]]}}, "none twice"),
    ],
)
def test_the_recipe_refuses(changes: dict[str, object], reason: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=reason):
        ModelConfig.model_validate({"language_model": {"path": "l"}, **changes})

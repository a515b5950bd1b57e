"""MGM's high-resolution tower: order in memory, the joined map, its own number format."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mgm_case import load_arrays, load_model

from vistune.models.mgm.convnext import ConvNeXtStages, joined_map
from vistune.models.mgm.mining import tiles


@pytest.fixture
def tower() -> ConvNeXtStages:
    torch.manual_seed(0)
    return ConvNeXtStages([16, 32, 48], [1, 2, 1]).requires_grad_(False).bfloat16()


@pytest.mark.parametrize("num_images", [1, 3])
def test_maps_stay_channels_last(tower: ConvNeXtStages, num_images: int) -> None:
    """What the mining cuts into windows was never moved: its rows are the tower's own."""
    stages = tower(torch.randn(num_images, 3, 64, 64).bfloat16())
    maps = joined_map(stages)
    last = torch.channels_last
    assert all(stage.is_contiguous(memory_format=last) for stage in (*stages, maps))
    assert tiles(maps, count=1).data_ptr() == maps.data_ptr()
    parts = tiles(maps, count=2)
    assert parts.flatten(0, 1).is_contiguous(memory_format=last)
    assert torch.equal(parts[:, 1], maps[..., :8, 8:])


def test_the_joined_map_is_interpolated_in_fp32(tower: ConvNeXtStages) -> None:
    stages = tower(torch.randn(2, 3, 64, 64).bfloat16())
    assert stages[1].dtype == torch.bfloat16
    wide = [
        F.interpolate(maps.float(), size=(16, 16), mode="bilinear", align_corners=False)
        for maps in stages
    ]
    assert torch.equal(joined_map(stages), torch.cat(wide, dim=1).bfloat16())


@pytest.mark.parametrize("trains", [True, False])
def test_autocast_reaches_towers_only_where_they_train(trains: bool) -> None:
    """Frozen, they run in their weights' format and keep nothing for a backward pass."""
    model, pixels = load_model("grid1"), load_arrays("grid1")["images_aux"]
    model.requires_grad_(trains)
    seen: list[tuple[bool, bool]] = []

    def look(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    model.vision_tower_aux.register_forward_pre_hook(look)
    model.vision_tower.register_forward_pre_hook(look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, maps, _ = model.paired_features(pixels)
    assert seen == [(trains, trains)] * 2
    assert low.requires_grad == maps.requires_grad == trains

"""`auto` becomes the largest row, or the fewest recomputed layers, that is predicted to fit."""

import numpy as np
import pytest
import torch
from tiny_parts import parts

from vistune.data.collate import pack_row
from vistune.models.budget import Room, fullest_row, usable_bytes
from vistune.models.facts import describe
from vistune.recipe import Recipe, TilesConfig
from vistune.types import EncodedSample, VisionGrid

GIB = 2**30


def recipe(config, *, batch=None, **train):
    return Recipe.model_validate(
        {
            "name": "t",
            "model": config.model_dump(),
            "data": {"train": [{"path": "d.json"}]},
            "batch": batch or {"samples": 4, "max_tokens": "auto"},
            "train": {"steps": 1, **train},
        }
    )


def room(config, asked, memory_gib, *, kind="cuda"):
    return Room.of(
        asked,
        config,
        describe(config),
        dtype=torch.bfloat16,
        kind=kind,
        memory_gib=memory_gib,
    )


def test_views_of_tiles_are_counted() -> None:
    grid = VisionGrid(patch_px=14, fixed_size_px=336)
    # A square picture in 1 x 2 tiles: 1,176 tokens and 24 of text for three views.
    tiles = TilesConfig(grids=((1, 2),))
    assert fullest_row(2400, grid, tiles=tiles).num_images == 6
    # 2 x 2 tiles of a square: 2,928 tokens for five views, fewer for each token than above.
    both = TilesConfig(grids=((2, 2), (1, 2)))
    assert fullest_row(12000, grid, tiles=both).num_images == 30
    assert fullest_row(2400, grid).num_images == 4


def test_rows_are_as_long_as_fit_and_no_longer(tmp_path):
    config = parts(tmp_path)
    asked = recipe(config)
    tight = room(config, asked, 1.02)
    chosen = tight.settle(asked)
    assert 2048 <= chosen.max_tokens < 32768 and chosen.max_tokens % 512 == 0
    budget = usable_bytes(1.02)
    peaks = [
        tight.memory.predict(fullest_row(n, tight.grid)).peak
        for n in (chosen.max_tokens, chosen.max_tokens + 512)
    ]
    assert chosen.fits and peaks[0] <= budget < peaks[1]
    assert room(config, asked, 80.0).settle(asked).max_tokens == 32768
    assert room(config, asked, 80.0, kind="cpu").settle(asked).max_tokens == 4096
    settled = chosen.apply(asked)
    assert settled.batch.row_tokens == chosen.max_tokens
    assert settled.train.checkpoint_layers == 0


def test_a_row_is_not_longer_than_a_step(tmp_path):
    config = parts(tmp_path)
    asked = recipe(config, batch={"tokens": 8192, "max_tokens": "auto"})
    assert room(config, asked, 80.0).settle(asked).max_tokens == 8192


@pytest.mark.parametrize(("memory_gib", "expected"), [(80.0, 0), (0.01, 2)])
def test_layers_are_recomputed_only_when_memory_asks_for_it(tmp_path, memory_gib, expected):
    config = parts(tmp_path)
    batch = {"samples": 4, "max_tokens": 16384}
    asked = recipe(config, batch=batch, checkpoint_layers="auto")
    chosen = room(config, asked, memory_gib).settle(asked)
    assert chosen.checkpoint_layers == expected and chosen.max_tokens == 16384
    assert chosen.fits == (expected == 0)


def test_advice_names_a_setting_that_fits_or_says_that_none_does(tmp_path):
    config = parts(tmp_path)
    asked = recipe(config, batch={"samples": 4, "max_tokens": 65536})
    rows = [pack_row([sample(30_000)])]
    small, large = (room(config, asked, memory_gib) for memory_gib in (0.5, 1.02))
    assert "Even with every layer recomputed" in small.advice(rows)
    assert "train.checkpoint_layers=" in large.advice(rows)
    # Only more layers than were recomputed when it did not fit can help.
    assert "train.checkpoint_layers=1 is" in large.advice(rows, tried_layers=0)
    every = large.memory.num_layers
    assert "see what else is on the device" in large.advice(rows, tried_layers=every)


def sample(num_tokens):
    ids = np.arange(num_tokens) % 200
    return EncodedSample(id="a", source="s", input_ids=ids, target_mask=ids > 190)

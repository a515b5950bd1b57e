"""Images of any size are made smaller until a row fits: tokens, pixels and report say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import llama_tokenizer, make_encoder, talk, write_rows
from PIL import Image

from vistune.data.check import check_sources
from vistune.data.count import TokenCounter
from vistune.data.encode import Encoder
from vistune.data.formats import open_source
from vistune.data.layout import ImageLayout, OneVisionLayout, PatchLayout
from vistune.data.loader import TrainData
from vistune.errors import DataError
from vistune.recipe import BatchConfig, DataConfig, SourceConfig

IMAGE_ID = len(llama_tokenizer())
LIMIT = 120


def patches() -> PatchLayout:
    return PatchLayout(
        image_token_id=IMAGE_ID,
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 400},
        },
        before=(5,),
        after=(6,),
        patch_px=14,
        merge=2,
        min_pixels=28 * 28,
        max_pixels=28 * 28 * 400,
    )


def tiles() -> OneVisionLayout:
    sizes = tuple((56 * rows, 56 * columns) for rows in range(1, 4) for columns in range(1, 4))
    return OneVisionLayout(
        image_token_id=IMAGE_ID,
        processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [list(size) for size in sizes],
            "size": {"height": 56, "width": 56},
        },
        tile_px=56,
        tokens_per_side=4,
        sizes_px=sizes,
        max_tiles=9,
    )


def encoder_of(layout: ImageLayout) -> Encoder:
    return make_encoder(layout=layout, image_token_id=IMAGE_ID)


SIZES = ((300, 420), (60, 80), (200, 150), (40, 500))


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    rows: list[Any] = []
    for k, (height, width) in enumerate(SIZES):
        noise = np.random.default_rng(k).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{k}.png")
        rows.append({"id": k, "image": f"{k}.png", "conversations": talk("<image>\nWhat?", "It.")})
    two = talk("<image>\nAnd <image>?", "Two.", "Sure?", "Yes.")
    rows.append({"id": "two", "image": ["0.png", "2.png"], "conversations": two})
    rows.append({"id": "text", "conversations": talk("word " * 200, "Long.")})
    return SourceConfig(path=str(write_rows(tmp_path, rows)))


def test_shrunk_images_fit_and_are_counted(source: SourceConfig) -> None:
    encoder = encoder_of(patches())
    whole = check_sources([source], encoder, max_tokens=4000, overlong="error")
    assert (whole.lengths > LIMIT).sum() >= 3
    report = check_sources([source], encoder, max_tokens=LIMIT, overlong="shrink_image")
    long = [k for k, tokens in enumerate(whole.lengths.tolist()) if tokens > LIMIT]
    assert report.notes["images_shrunk"] == len(long) - 1
    assert [(row.id, row.reason) for row in report.rejected] == [("text", "overlong")]
    data = DataConfig(train=(source,), overlong="shrink_image", max_dropped_frac=0.2, workers=0)
    batch = BatchConfig(max_tokens=LIMIT, samples=5, pack=False)
    run = TrainData(data, batch, encoder, 0, report=report)
    seen = set()
    for row in next(run.steps()):
        (id,) = row.sample_ids
        assert not row.rejected
        index = [str(k) for k in range(4)] + ["two"]
        k = index.index(id)
        seen.add(id)
        assert row.num_tokens == report.lengths[k] <= LIMIT
        assert row.num_image_tokens == report.image_tokens[k]
        # What the model is told, the pixels it is given and the ids all speak of one size.
        patches_seen = sum(rows * columns for _, rows, columns in row.image_shapes)
        assert row.pixel_values_NCYX is not None
        assert row.pixel_values_NCYX.shape[0] == patches_seen
        assert int((row.input_ids_BT == IMAGE_ID).sum()) == patches_seen // 4
        assert row.position_ids_BT.shape == (3, 1, row.num_tokens)
        was = whole.lengths[k]
        assert row.num_tokens == was if was <= LIMIT else row.num_tokens < was
        if was > LIMIT:  # not smaller than need be: a third of the room at most is left
            assert row.num_tokens > LIMIT * 2 // 3
    assert seen == {"0", "1", "2", "3", "two"}


def test_a_shrunk_image_is_the_whole_image(source: SourceConfig) -> None:
    """Scaled down, not cut: its mean colour and shape stay."""
    encoder = encoder_of(patches())
    sample = open_source(source).read(0)
    whole = encoder.encode(sample, max_tokens=4000, overlong="error")
    small = encoder.encode(sample, max_tokens=LIMIT, overlong="shrink_image")
    (_, rows, columns), (_, small_rows, small_columns) = (*whole.image_shapes, *small.image_shapes)
    assert small_rows / small_columns == pytest.approx(rows / columns, rel=0.25)
    assert small.pixel_values[0].mean() == pytest.approx(whole.pixel_values[0].mean(), abs=0.02)
    assert small.target_mask.sum() == whole.target_mask.sum()


@pytest.mark.parametrize("overlong", ["drop_turn", "shrink_image", "truncate_text"])
@pytest.mark.parametrize("layout", [patches(), tiles()], ids=lambda one: one.kind)
@pytest.mark.parametrize("limit", [60, 120, 250])
def test_the_check_says_what_training_gets(
    source: SourceConfig, layout: ImageLayout, overlong: Any, limit: int
) -> None:
    encoder, reader = encoder_of(layout), open_source(source)
    try:
        report = check_sources([source], encoder, max_tokens=limit, overlong=overlong)
    except DataError:
        assert (layout.kind, overlong) == ("onevision", "shrink_image")
        return
    for index, row in enumerate(report.accepted[0].tolist()):
        encoded = encoder.encode(reader.read(row), max_tokens=limit, overlong=overlong)
        assert encoded.input_ids.size == report.lengths[index] <= limit
        assert encoded.num_image_tokens == report.image_tokens[index]


def test_how_an_image_is_shown_depends_on_the_images_that_are_left(tmp_path: Path) -> None:
    """A round that is left out takes its image along; the one that stays is then shown alone."""
    for k in range(2):
        Image.new("RGB", (160, 160), "red").save(tmp_path / f"{k}.png")
    rounds = talk("<image>\nWhat?", "It.", "And <image>?" + " word" * 300, "Two.")
    path = write_rows(tmp_path, [{"image": ["0.png", "1.png"], "conversations": rounds}])
    source, encoder = SourceConfig(path=str(path)), encoder_of(tiles())
    sample = open_source(source).read(0)
    sizes = [(160, 160)] * 2
    assert encoder.num_image_tokens(0, sizes) != encoder.num_image_tokens(0, sizes[:1])
    counter = TokenCounter(encoder)
    for turns in (sample.turns[:2], sample.turns):
        exact = encoder.tokenise_turns(turns, sizes)
        found = counter.count(turns, sizes)
        assert (found.tokens, found.image_tokens) == (exact.ids.size, exact.num_image_tokens)
    limit = int(encoder.tokenise_turns(sample.turns[:2], sizes).ids.size)
    report = check_sources([source], encoder, max_tokens=limit, overlong="drop_turn")
    encoded = encoder.encode(sample, max_tokens=limit, overlong="drop_turn")
    assert report.lengths.tolist() == [encoded.input_ids.size] == [limit]
    assert len(encoded.image_shapes) == 1

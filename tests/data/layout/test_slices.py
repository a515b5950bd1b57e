"""MiniCPM-V's slices at the sizes it is published with, against the public processor's steps."""

from __future__ import annotations

import random
from typing import Any

import pytest
from packaging.version import Version

from vistune.data.layout import SliceLayout
from vistune.data.layout.slices import Slicing


def layout_of(**values: Any) -> SliceLayout:
    return SliceLayout(
        image_token_id=7,
        processor={"image_processor_type": "MiniCPMV4_6ImageProcessor"},
        patch_px=14,
        merge=4,
        slice_px=448,
        whole_ids=(1, 2),
        slice_ids=(3, 4),
        row_end_ids=(5,),
        **{"max_slices": 9, **values},
    )


def public_slicing(layout: SliceLayout, height: int, width: int) -> Slicing:
    processor = layout.image_processor
    fixed: dict[str, Any] = {"scale_resolution": 448, "patch_size": 14, "downsample_mode": "16x"}
    size = height, width
    grid = processor.get_sliced_grid(size, layout.max_slices, 448)
    whole = processor.find_best_resize(size, **fixed, allow_upscale=grid is None)
    tall, wide = (side // 14 for side in whole)
    if grid is None:
        return Slicing(tall, wide, 0, 0, 0, 0)
    refined = processor.get_refine_size(size, grid, **fixed, allow_upscale=True)
    rows, columns = grid
    return Slicing(tall, wide, rows, columns, refined[0] // rows // 14, refined[1] // columns // 14)


@pytest.mark.parametrize("most", [1, 2, 9, 16])
def test_slices_are_the_public_processors(most: int) -> None:
    import transformers

    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its steps take other arguments, and the family is refused")
    layout = layout_of(max_slices=most)
    draw = random.Random(most)
    sizes = [(1, 5000), (5000, 1), (448, 448), (449, 448), (896, 896), (1344, 1344)]
    for _ in range(400):
        side = draw.choice((40, 500, 1500, 5000))
        sizes.append((draw.randint(1, side), draw.randint(1, side)))
    for size in sizes:
        assert layout.shape(*size) == public_slicing(layout, *size), size


def test_the_block_shows_the_whole_image_and_then_the_slices() -> None:
    layout = layout_of()
    slicing = Slicing(*layout.shape(900, 1300))
    assert (slicing.rows, slicing.columns) == (2, 3)
    ids = layout.block(900, 1300)
    assert [int(i) for i in ids if i != 7] == [1, 2, *[3, 4] * 3, 5, *[3, 4] * 3]
    assert (ids == 7).sum() * 16 == layout.num_inputs(900, 1300)
    assert [int(i) for i in layout.block(300, 300) if i != 7] == [1, 2]


def test_a_bound_takes_the_most_slices_that_fit() -> None:
    layout = layout_of()
    free = layout.num_tokens(1300, 1300)
    counts = [layout.limited(bound).num_tokens(1300, 1300) for bound in range(66, free + 1)]
    assert counts == sorted(counts)
    assert all(count <= bound for bound, count in enumerate(counts, start=66))
    assert len(set(counts)) > 3
    assert counts[-1] == free

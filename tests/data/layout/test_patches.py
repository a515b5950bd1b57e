"""The grid of patches: sizes as the public processors choose them, and what is told of an image."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vistune.data.layout import PatchLayout
from vistune.errors import DataError, ImageError

BOUNDS = {
    "qwen2.5": (14, 2, 56 * 56, 28 * 28 * 1280),
    "qwen3": (16, 2, 65536, 16777216),
    "tight": (14, 2, 100 * 28 * 28, 100 * 28 * 28),
    "glm": (14, 2, 112 * 112, 28 * 28 * 15000),
    "paddle": (14, 2, 384 * 384, 1536 * 1536),
}


def layout_of(name: str) -> PatchLayout:
    patch, merge, least, most = BOUNDS[name]
    glm = name == "glm"
    return PatchLayout(
        image_token_id=7,
        processor={
            "image_processor_type": "Glm4vImageProcessor" if glm else "Qwen2VLImageProcessor"
        },
        before=(5,),
        after=(6,),
        patch_px=patch,
        merge=merge,
        min_pixels=least,
        max_pixels=most,
        frames=2 if glm else 1,
        enlarge_first=glm,
        enlarge_sides=name == "paddle",
    )


def public_size(name: str, height: int, width: int) -> tuple[int, int]:
    """The public function; it raises ValueError for what is too elongated."""
    patch, merge, least, most = BOUNDS[name]
    bounds: dict[str, Any] = {
        "factor": patch * merge,
        "min_pixels": least,
        "max_pixels": most,
    }
    if name == "glm":
        from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as glm_resize

        return tuple(glm_resize(2, height, width, temporal_factor=2, **bounds))
    if name == "paddle":
        from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
            smart_resize as ocr_resize,
        )

        return tuple(ocr_resize(height, width, **bounds))
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return tuple(smart_resize(height, width, **bounds))


def sizes() -> list[tuple[int, int]]:
    draw = random.Random(0)
    found = [
        (1, 1),
        (1, 200),
        (200, 1),
        (1, 201),
        (27, 5401),
        (5400, 27),
        (28, 28),
        (14, 14),
        (42, 70),
    ]
    for most in (40, 300, 3000, 20000):
        found += [(draw.randint(1, most), draw.randint(1, most)) for _ in range(1500)]
    for _ in range(500):  # at the bounds of elongation
        short = draw.randint(1, 60)
        found.append((short, 200 * short + draw.randint(-3, 3)))
    return [(max(1, h), max(1, w)) for h, w in found]


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_sizes_are_the_public_ones(name: str) -> None:
    layout, refused = layout_of(name), 0
    for height, width in sizes():
        try:
            expected = public_size(name, height, width)
        except ValueError:
            refused += 1
            with pytest.raises(ImageError, match="more than 200 times"):
                layout.resized(height, width)
            continue
        assert layout.resized(height, width) == expected, (height, width)
    assert refused > 100


def test_block_and_shape() -> None:
    layout = layout_of("qwen2.5")
    rows, columns = layout.resized(300, 500)
    assert layout.shape(300, 500) == (1, rows // 14, columns // 14)
    body = [7] * (rows * columns // 28**2)
    assert layout.block(300, 500).tolist() == [5, *body, 6]
    assert layout.num_tokens(300, 500) == len(body) + 2


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "glm"])
def test_a_budget_bounds_the_tokens(name: str) -> None:
    whole = layout_of(name)
    layout = whole.limited(100)
    assert layout.processor["size"]["longest_edge"] == layout.max_pixels
    draw = random.Random(1)
    for _ in range(2000):
        height, width = draw.randint(1, 3000), draw.randint(1, 3000)
        if max(height, width) <= 8 * min(height, width):
            assert layout.num_body(height, width) <= 100
    # Lowering what is low enough already changes nothing.
    assert whole.limited(10**6).resized(3000, 2000) == whole.resized(3000, 2000)
    with pytest.raises(DataError, match="needs a token"):
        layout.limited(0)


def test_the_budget_reaches_the_pixels() -> None:
    layout = layout_of("qwen2.5").limited(20)
    picture = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    assert layout.pixels(picture).shape == (layout.num_inputs(200, 300), 3 * 2 * 14 * 14)
    (seen,) = layout.pictures(picture)
    assert (seen.height, seen.width) == layout.resized(200, 300)


def test_positions_go_on_behind_the_longer_side() -> None:
    layout = layout_of("qwen2.5")
    ids = np.array([1, 5, *[7] * 6, 6, 2])
    positions = layout.positions(ids, [(1, 4, 6)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_bounds_that_cross_are_refused() -> None:
    values = layout_of("glm").model_dump()
    with pytest.raises(ValueError, match="min_pixels"):
        PatchLayout.model_validate({**values, "min_pixels": 10**9})

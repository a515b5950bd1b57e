"""The fast image plans: how far from the exact one, and where their pixels come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import CLIP_MEAN, CLIP_STD, make_plan
from PIL import Image

from vistune.data.image import ImagePlan, full_size, load, pixels_of
from vistune.errors import DataError
from vistune.recipe import ImageConfig
from vistune.types import ImageDefaults, ImageRef

LEVEL = 1 / 255 / min(CLIP_STD)
"""One of 255 levels in normalised units, where it counts most."""


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes with some grain, as a camera gives them."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (17 + c)) + np.cos(y / (23 - c)) for c in range(3)]
    values = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


SIZES = [(640, 480), (427, 640), (500, 500), (336, 336), (56, 91), (1000, 30), (7, 800), (1, 1)]


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_fast_is_within_two_levels_of_exact(mode: str, resample: str) -> None:
    # Weights of 16 bits instead of 32: a value near the middle of two levels can fall on the other
    # side in each of the two passes. Measured on photographs of 300 to 2000 px: 2 at most, and
    # 0.014 on average; 0.16 on average where 7 columns become 112.
    for size in SIZES:
        image = photo(*size)
        exact = make_plan(mode=mode, size_px=112, resample=resample)
        fast = exact.model_copy(update={"decode": "fast"})
        difference = np.abs(fast.apply(image) - exact.apply(image)) / LEVEL
        assert difference.max() < 2.1, size
        assert difference.mean() < (0.2 if min(size) < 10 else 0.02), size
        shown = np.asarray(fast.to_square(image)).astype(int)
        apart = np.abs(shown - np.asarray(exact.to_square(image)).astype(int))
        assert apart.max() <= 2
        # What a preview shows is what the tower gets: only the normalisation lies between.
        means, stds = (np.array(v).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        expected = (shown.transpose(2, 0, 1) / 255 - means) / stds
        np.testing.assert_allclose(fast.apply(image), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decodes_less_and_stays_near(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(901, 701).save(tmp_path / "a.jpg", quality=92, exif=exif)
    ref = ImageRef(tmp_path / "a.jpg", "a.jpg")
    exact = make_plan(mode=mode, size_px=112)
    scaled = exact.model_copy(update={"decode": "scaled"})
    small = load(ref, scaled)
    turned = orientation == 6
    assert full_size(small) == ((901, 701) if turned else (701, 901))
    fraction = 4 if mode == "pad" else 2  # 901 / 112 > 8 = 2 x 4; 701 / 112 < 8
    assert sorted(small.size) == [-(-701 // fraction), -(-901 // fraction)]
    # The picture may lie a quarter of a pixel off, and libjpeg's small transform is a box filter.
    difference = np.abs(scaled.apply(small) - pixels_of(ref, exact)) / LEVEL
    assert difference.mean() < 4
    shifted = np.roll(pixels_of(ref, exact), 1, axis=2)  # one pixel off would be seen
    assert np.abs(shifted - pixels_of(ref, exact)).mean() / LEVEL > 2 * difference.mean()


def test_scaled_leaves_small_photos_and_other_files_whole(tmp_path: Path) -> None:
    photo(300, 220).save(tmp_path / "a.jpg")
    photo(900, 700).save(tmp_path / "b.png")
    plan = make_plan(mode="crop", size_px=112, decode="scaled")
    for name, size in (("a.jpg", (300, 220)), ("b.png", (900, 700))):
        assert load(ImageRef(tmp_path / name, name), plan).size == size


def test_picture_outlives_the_image_it_came_from() -> None:
    plan = make_plan(mode="crop", size_px=56, decode="fast")
    image = photo(56, 56)  # needs no resize: the pixels are Pillow's own until copied
    expected = np.asarray(image).copy()
    square = plan._vector_square(image)
    del image
    _ = [photo(56, 56) for _ in range(4)]
    np.testing.assert_array_equal(square[:, :, :3], expected)


def test_large_pictures_lie_in_several_blocks() -> None:
    image = photo(2100, 2100)  # more than Pillow keeps in one piece
    with pytest.raises(ValueError):
        image.__arrow_c_array__()
    exact = make_plan(mode="crop", size_px=56)
    fast = exact.model_copy(update={"decode": "fast"})
    assert np.abs(fast.apply(image) - exact.apply(image)).max() < 2.1 * LEVEL


def resolve(**change: Any) -> ImagePlan:
    defaults = ImageDefaults(size_px=336, mean=CLIP_MEAN, std=CLIP_STD, resample="lanczos")
    return ImagePlan.resolve(ImageConfig(**change), defaults)


def test_the_plan_says_how_images_are_decoded_and_old_plans_are_exact() -> None:
    plan = resolve(decode="fast", resample="bicubic")
    assert ImagePlan.model_validate(json.loads(plan.model_dump_json())).decode == "fast"
    old = {k: v for k, v in plan.model_dump().items() if k != "decode"}
    assert ImagePlan.model_validate(old).decode == "exact"
    assert resolve().decode == "exact"
    with pytest.raises(DataError, match="lanczos has no fast form"):
        resolve(decode="scaled")

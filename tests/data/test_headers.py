"""What is read quickly is what Pillow says, and what is not plain is left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_plan
from PIL import Image

from vistune.data.headers import Sizes, plain_size
from vistune.data.image import probe
from vistune.errors import ImageError
from vistune.types import ImageRef


def save(
    path: Path, *, size: tuple[int, int] = (37, 23), mode: str = "RGB", **options: Any
) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"mode": "L"}),
        ("a.jpg", {"quality": 30, "optimize": True, "comment": "hello", "dpi": (72, 72)}),
        ("a.jpg", {"restart_marker_rows": 1}),
        ("a.png", {}),
        ("a.png", {"mode": "L"}),
        ("a.png", {"mode": "P"}),
        ("a.png", {"mode": "1", "dpi": (72, 72)}),
    ],
)
def test_plain_files_are_read(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = save(tmp_path / name, **options)
    assert plain_size(path) == (23, 37) == probe(ImageRef(path, name), make_plan())


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"exif": exif(6)}),
        ("a.jpg", {"mode": "CMYK"}),
        ("a.jpg", {"icc_profile": b"x" * 9000}),
        ("a.png", {"exif": exif(6)}),
        ("a.png", {"mode": "RGBA"}),
        ("a.webp", {}),
        ("a.bmp", {}),
        ("a.png", {"save_all": True, "append_images": [Image.new("RGB", (37, 23))]}),
    ],
)
def test_what_is_not_plain_is_left_to_pillow(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    assert plain_size(save(tmp_path / name, **options)) is None


def test_every_damage_is_left_to_pillow_or_harmless(tmp_path: Path) -> None:
    # Whatever a single wrong byte in the header does: never another answer than Pillow's.
    for name in ("a.jpg", "a.png"):
        content = save(tmp_path / name, size=(9, 7)).read_bytes()
        path = tmp_path / f"damaged_{name}"
        head = min(len(content), 700)
        for at in range(head):
            for value in (content[at] ^ 1, content[at] ^ 0x80, 0, 255):
                path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
                found = plain_size(path)
                if found is not None:
                    assert found == probe(ImageRef(path, name), make_plan(mode="resize")), (
                        name,
                        at,
                        value,
                    )
        for cut in range(0, len(content) - 20, 7):
            path.write_bytes(content[:cut])
            assert plain_size(path) is None


def test_sizes_are_read_once_and_limits_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    sizes = Sizes(make_plan())
    assert sizes.of(ImageRef(path, "a.jpg")) == (23, 37)
    path.unlink()
    assert sizes.of(ImageRef(path, "a.jpg")) == (23, 37)
    with pytest.raises(ImageError, match="not there") as caught:
        sizes.of(ImageRef(tmp_path / "b.jpg", "b.jpg"))
    assert caught.value.reason == "image_missing"
    large = save(tmp_path / "c.jpg")
    with pytest.raises(ImageError) as caught:
        Sizes(make_plan(max_pixels=500)).of(ImageRef(large, "c.jpg"))
    assert caught.value.reason == "image_too_large"

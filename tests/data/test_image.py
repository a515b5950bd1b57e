"""Pixels equal to the public processors' to the bit, and every bad file refused by name."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CLIP_MEAN, CLIP_STD, FIXTURES, make_plan
from PIL import Image

from vistune.data.image import ImagePlan, load, pixels_of, probe
from vistune.errors import DataError, ImageError
from vistune.recipe import ImageConfig
from vistune.types import ImageDefaults, ImageRef

RNG = np.random.default_rng(0)


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture with some grain, which a resampling filter cannot hide a mistake in."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + c)) + np.cos(y / (11 - c)) for c in range(3)]
    values = 128 + 50 * np.stack(waves, axis=-1) + RNG.normal(0, 20, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def ref(path: Path) -> ImageRef:
    return ImageRef(path=path, name=path.name)


@pytest.mark.parametrize(("mode", "key"), [("pad", "images_pad"), ("crop", "images_square")])
def test_pixels_equal_llava(mode: str, key: str) -> None:
    golden = np.load(FIXTURES / "llava15" / "images.npz")
    plan = make_plan(mode=mode, size_px=56)
    for k in range(3):
        ours = plan.apply(Image.fromarray(golden[f"picture_{k}_uint8"]))
        np.testing.assert_array_equal(ours, golden[key][k])


@pytest.mark.parametrize("size", [(640, 427), (99, 301), (56, 56), (57, 55), (1, 7), (7, 1)])
def test_pixels_equal_transformers(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = photo(*size)
    square = {"height": 56, "width": 56}
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    expected = clip(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(make_plan(mode="crop", size_px=56).apply(image), expected)
    siglip = SiglipImageProcessorPil(size=square)
    half = (0.5, 0.5, 0.5)
    expected = siglip(image, return_tensors="np")["pixel_values"][0]
    plan = make_plan(mode="resize", size_px=56, mean=half, std=half)
    np.testing.assert_array_equal(plan.apply(image), expected)


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_work_left_out_of_the_resize_changes_no_bit(resample: str) -> None:
    rng = np.random.default_rng(5)
    sizes = [(640, 480), (481, 480), (56, 10), (57, 56), (40, 3), (2000, 7)]
    sizes += [tuple(sorted(rng.integers(2, 500, 2).tolist(), reverse=True)) for _ in range(30)]
    for width, height in sizes:
        plan = make_plan(mode="pad", size_px=56, resample=resample)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        filter = getattr(Image.Resampling, resample.upper())
        expected = plan._padded(image).resize((56, 56), resample=filter)
        np.testing.assert_array_equal(np.asarray(plan.to_square(image)), np.asarray(expected))
        plan = make_plan(mode="crop", size_px=56, resample=resample)
        new_width = 56 * width // height
        left = (new_width - 56) // 2
        whole = image.resize((new_width, 56), resample=filter)
        expected = whole.crop((left, 0, left + 56, 56))
        np.testing.assert_array_equal(np.asarray(plan.to_square(image)), np.asarray(expected))


def test_pad_colour_and_place() -> None:
    plan = make_plan(mode="pad", size_px=8)
    assert plan.pad_colour == (122, 116, 104)
    square = np.asarray(plan._padded(Image.new("RGB", (4, 7), (1, 2, 3))))
    assert square.shape == (7, 7, 3)
    assert (square[:, 1:5] == (1, 2, 3)).all()  # (7 - 4) // 2 = 1 column in front, 2 behind
    assert (square[:, [0, 5, 6]] == plan.pad_colour).all()


def test_resolve_takes_the_towers_values_for_auto() -> None:
    defaults = ImageDefaults(size_px=336, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic")
    plan = ImagePlan.resolve(ImageConfig(mode="crop"), defaults)
    assert (plan.mode, plan.size_px, plan.mean, plan.resample) == (
        "crop",
        336,
        CLIP_MEAN,
        "bicubic",
    )
    plan = ImagePlan.resolve(ImageConfig(size_px=224, resample="bilinear"), defaults)
    assert (plan.size_px, plan.resample) == (224, "bilinear")
    assert plan.size_for(10, 20) == (224, 224)
    with pytest.raises(DataError, match="max_pixels"):
        ImagePlan.resolve(ImageConfig(max_pixels=10**10), defaults)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = photo(40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    from PIL import ImageOps

    expected = ImageOps.exif_transpose(Image.open(path))
    upright = load(ref(path), make_plan())
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(expected))
    assert probe(ref(path), make_plan()) == (upright.height, upright.width)


def test_modes_become_rgb_by_the_stated_rules(tmp_path: Path) -> None:
    plan = make_plan()
    rgb = photo(30, 20)
    values = np.asarray(rgb)

    def through(image: Image.Image, name: str) -> np.ndarray:
        image.save(tmp_path / name)
        return np.asarray(load(ref(tmp_path / name), plan))

    np.testing.assert_array_equal(through(rgb, "rgb.png"), values)
    opaque = rgb.convert("RGBA")
    np.testing.assert_array_equal(through(opaque, "opaque.png"), values)
    half = opaque.copy()
    half.putalpha(0)
    assert (through(half, "clear.png") == 255).all()  # transparent shows white, not what is hidden
    grey = rgb.convert("L")
    expected = np.asarray(grey.convert("RGB"))
    np.testing.assert_array_equal(through(grey, "grey.png"), expected)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(through(deep, "deep.png"), expected)
    palette = rgb.quantize(16)
    np.testing.assert_array_equal(through(palette, "pal.png"), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palt.png", transparency=0)
    seen = np.asarray(load(ref(tmp_path / "palt.png"), plan))
    assert (seen[np.asarray(palette) == 0] == 255).all()
    cmyk = rgb.convert("CMYK")
    cmyk.save(tmp_path / "cmyk.jpg", quality=100)
    assert load(ref(tmp_path / "cmyk.jpg"), plan).mode == "RGB"
    bit = rgb.convert("1")
    np.testing.assert_array_equal(through(bit, "bit.png"), np.asarray(bit.convert("RGB")))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError) as caught:
        load(ref(tmp_path / "f.tiff"), make_plan())
    assert caught.value.reason == "image_mode_unsupported"


@pytest.mark.parametrize("read", [probe, load])
def test_a_pipe_is_refused_instead_of_waited_for(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="this is a pipe"):
        read(ref(tmp_path / "pipe.png"), make_plan())


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and carries almost no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    photo(200, 120).save(buffer, format)
    return buffer.getvalue()


BAD_FILES = {
    "empty.jpg": (b"", "image_empty"),
    "text.jpg": (b"<html>404 not found</html>", "image_unreadable"),
    "cut.jpg": (encoded("JPEG")[:-700], "image_truncated"),
    "cut.png": (encoded("PNG")[:-700], "image_truncated"),
    "cut.webp": (encoded("WEBP")[:-100], "image_truncated"),
    "half_header.jpg": (encoded("JPEG")[:20], "image_unreadable"),
    "bomb.png": (png_header(60_000, 60_000), "image_too_large"),
    "big.png": (png_header(2_000, 2_000), "image_too_large"),
    "strip.png": (png_header(1, 5_000), "image_too_elongated"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_from_the_header_alone(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    plan = make_plan(max_pixels=1_000_000)
    for read in (probe, load):
        with pytest.raises(ImageError) as caught:
            read(ref(tmp_path / name), plan)
        assert caught.value.reason == reason
        assert caught.value.where == name
        assert caught.value.fix


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.jpg", "image_missing"), (tmp_path, "image_unreadable")):
        with pytest.raises(ImageError) as caught:
            probe(ref(path), make_plan())
        assert caught.value.reason == reason


def test_formats_that_other_programs_would_draw_are_refused(tmp_path: Path) -> None:
    for suffix in ("eps", "pdf"):
        photo(20, 10).save(tmp_path / f"a.{suffix}")
        with pytest.raises(ImageError, match="format that is known") as caught:
            probe(ref(tmp_path / f"a.{suffix}"), make_plan())
        assert caught.value.reason == "image_unreadable"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jp2"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    photo(20, 10).save(tmp_path / f"a.{suffix}")
    assert load(ref(tmp_path / f"a.{suffix}"), make_plan()).size == (20, 10)


def test_corrupt_pixels_are_found_when_decoding(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(png_header(300, 300))
    assert probe(ref(tmp_path / "bad.png"), make_plan()) == (300, 300)  # the header is sound
    with pytest.raises(ImageError) as caught:
        load(ref(tmp_path / "bad.png"), make_plan())
    assert caught.value.reason == "image_corrupt"


def test_animation_is_refused_and_a_still_gif_is_not(tmp_path: Path) -> None:
    frames = [photo(16, 16), photo(16, 16)]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError) as caught:
            probe(ref(path), make_plan())
        assert caught.value.reason == "image_animated"
    frames[0].save(tmp_path / "still.gif")
    assert load(ref(tmp_path / "still.gif"), make_plan()).mode == "RGB"


def test_probe_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("jpg", "png", "webp", "gif"):
        photo(50, 30).save(tmp_path / f"a.{suffix}")

    def no_decoding(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_decoding)
    for suffix in ("jpg", "png", "webp"):
        assert probe(ref(tmp_path / f"a.{suffix}"), make_plan()) == (30, 50)


def test_image_in_memory_takes_the_same_path(tmp_path: Path) -> None:
    image = photo(40, 60)
    image.save(tmp_path / "a.png")
    plan = make_plan()
    np.testing.assert_array_equal(pixels_of(image, plan), pixels_of(ref(tmp_path / "a.png"), plan))
    assert probe(image, plan) == (60, 40)


def test_plan_survives_json() -> None:
    plan = make_plan()
    assert ImagePlan.model_validate(json.loads(plan.model_dump_json())) == plan

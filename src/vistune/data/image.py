"""How an image file becomes the pixels a vision tower sees: one explicit, frozen plan.

The arithmetic of an `exact` plan is that of transformers' Pillow-backed CLIP and SigLIP processors,
to the bit (`fast` and `scaled` plans: see `data.vector`); what differs from them is stated here and
nowhere else:

- The EXIF orientation of the header is applied.
- Transparent pixels are laid over white (a plain conversion would show what is hidden under them).
- 16-bit grey is scaled to 8 bit (a plain conversion would clip it to white).
- A file with several frames (an animation) is refused, except a phone's MPO, whose first frame is
  the photograph.
- A file is refused before it is decoded when its header announces more than `max_pixels`, or when
  padding or scaling would make a picture of more than that.

Nothing here falls back: every refusal is an `ImageError` with a short fixed reason.
"""

from __future__ import annotations

import functools
import os
from typing import IO, Annotated, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field

from vistune.data.image_file import open_bytes, require_file
from vistune.data.vector import VECTOR_FILTERS, normalised, squared
from vistune.errors import DataError, ImageError
from vistune.recipe import ImageConfig, Section
from vistune.types import ImageDefaults, ImageRef

Triple: TypeAlias = tuple[float, float, float]
ImageLike: TypeAlias = ImageRef | Image.Image

_PILLOW_LIMIT = 178_956_970  # above this Pillow itself refuses to open a file
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
"""Files that are opened. Pillow knows more, and starts other programs for some (EPS)."""
_TAIL_BYTES = 65_536
_FULL_SIZE = "vistune_full_size"
_SPARE = 2
"""A scaled decode must leave this many times the pixels a side that are needed (1 would show)."""
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "WEBP": b""}


class ImagePlan(Section):
    """What is done to an image, every value concrete."""

    mode: Literal["crop", "pad", "resize"]
    """`crop`: short side to `size_px`, centre square. `pad`: to a square with the mean colour, then
    to `size_px`. `resize`: to the square, aspect not kept."""
    size_px: Annotated[int, Field(ge=1)]
    """Side of the square the tower sees."""
    mean: Triple
    """Per-channel mean, on pixels in [0, 1]."""
    std: Triple
    """Per-channel standard deviation, on pixels in [0, 1]."""
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Filter of the resize."""
    max_pixels: Annotated[int, Field(ge=1, le=_PILLOW_LIMIT)] = _PILLOW_LIMIT
    """Images with more pixels than this are refused before they are decoded."""
    decode: Literal["exact", "fast", "scaled"] = "exact"
    """`exact`: the public processors' bits. `fast`: within 2 of 255 levels of them. `scaled`: also
    lets libjpeg decode at a fraction of the size where that is still twice what is needed."""

    @classmethod
    def resolve(cls, config: ImageConfig, defaults: ImageDefaults) -> ImagePlan:
        """Returns the plan of a recipe, `auto` replaced by what the tower's own file says.

        Raises:
            DataError: `max_pixels` is more than Pillow opens, or the filter has no fast form.
        """
        if config.max_pixels > _PILLOW_LIMIT:
            raise DataError(
                "Pillow opens no image of that many pixels",
                where="data.image.max_pixels",
                got=config.max_pixels,
                expected=f"at most {_PILLOW_LIMIT}",
            )
        resample = defaults.resample if config.resample == "auto" else config.resample
        if config.decode != "exact" and resample not in VECTOR_FILTERS:
            raise DataError(
                f"the filter {resample} has no fast form",
                where="data.image.decode",
                got=config.decode,
                expected=f"data.image.resample one of {', '.join(VECTOR_FILTERS)}",
                fix="data.image.decode=exact",
            )
        return cls(
            mode=defaults.mode if config.mode == "auto" else config.mode,
            size_px=defaults.size_px if config.size_px == "auto" else config.size_px,
            mean=defaults.mean if config.mean == "auto" else config.mean,
            std=defaults.std if config.std == "auto" else config.std,
            resample=resample,
            max_pixels=config.max_pixels,
            decode=config.decode,
        )

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the tower's input for an image of `height` x `width`."""
        return self.size_px, self.size_px

    def check_size(self, height: int, width: int, *, name: str) -> None:
        """Refuses an image that would not fit into memory, from its header alone.

        Raises:
            ImageError: The image, or what padding or scaling makes of it, exceeds `max_pixels`.
        """
        if height * width > self.max_pixels:
            raise ImageError(
                f"{width} x {height} pixels is more than data.image.max_pixels",
                reason="image_too_large",
                where=name,
                got=height * width,
                expected=f"at most {self.max_pixels}",
                fix="shrink the image, or raise data.image.max_pixels",
            )
        long, short = max(height, width), min(height, width)
        grown = long * long
        if self.mode == "crop":
            grown = self.size_px * int(self.size_px * long / short)
        if self.mode != "resize" and grown > self.max_pixels:
            raise ImageError(
                f"{width} x {height} pixels is too long and thin for data.image.mode={self.mode}:"
                f" it would grow to {grown} pixels",
                reason="image_too_elongated",
                where=name,
                expected=f"at most {self.max_pixels}",
                fix="cut the image, or set data.image.mode=resize",
            )

    def apply(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Returns the tower's input.

        Args:
            image: A Pillow image in mode RGB.

        Returns:
            float32 [3, Y, X], normalised.

        Source: transformers' CLIPImageProcessor and SiglipImageProcessor on Pillow; `pad` is
            LLaVA's expand-to-square followed by the same.
        """
        if self.decode != "exact":
            return normalised(self._vector_square(image), mean=self.mean, std=self.std)
        pixels = np.asarray(self.to_square(image))
        out = np.empty((3, pixels.shape[0], pixels.shape[1]), dtype=np.float32)
        for channel, table in enumerate(_tables(self.mean, self.std)):
            np.take(table, pixels[:, :, channel], out=out[channel], mode="clip")
        return out

    def to_square(self, image: Image.Image) -> Image.Image:
        """Returns the image as the tower sees it, before normalisation (mode RGB)."""
        if self.decode != "exact":
            return Image.fromarray(np.ascontiguousarray(self._vector_square(image)[:, :, :3]))
        size, resample = self.size_px, RESAMPLE[self.resample]
        if self.mode == "resize":
            return image.resize((size, size), resample=resample)
        if self.mode == "pad":
            if image.width > image.height and self.resample != "nearest":
                return self._padded_wide(image)
            image = self._padded(image)
        width, height = image.size
        short, long = sorted((width, height))
        new_long = int(size * long / short)
        new_width, new_height = (size, new_long) if width <= height else (new_long, size)
        if width > height and self.resample != "nearest":
            # Pillow resizes columns first, then rows: what is cropped away needs no second pass.
            image = image.resize((new_width, height), resample=resample)
            left = (new_width - size) // 2
            image = image.crop((left, 0, left + size, height))
            return image.resize((size, size), resample=resample)
        image = image.resize((new_width, new_height), resample=resample)
        if new_width == new_height:
            return image
        left, top = (new_width - size) // 2, (new_height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def draft_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns the least (width, height) a JPEG may be decoded at, or None for its own.

        Args:
            height: Pixel rows of the file.
            width: Pixel columns of the file.
        """
        if self.decode != "scaled":
            return None
        short, long = sorted((height, width))
        scale = self.size_px / (long if self.mode == "pad" else short)
        return int(_SPARE * width * scale), int(_SPARE * height * scale)

    def _vector_square(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        return squared(
            image,
            mode=self.mode,
            size_px=self.size_px,
            resample=cast(Literal["bilinear", "bicubic"], self.resample),
            pad_colour=self.pad_colour,
            full_size=full_size(image),
        )

    def _padded_wide(self, image: Image.Image) -> Image.Image:
        # The same bits as padding first, for less work. Pillow resizes columns first, rounds to 8
        # bits, then rows: a row of one colour stays that colour (its filter's integer weights add
        # up to 1 within 1e-5), so only the picture's own rows need the first pass.
        width, height = image.size
        narrow = image.resize((self.size_px, height), resample=RESAMPLE[self.resample])
        tall = Image.new("RGB", (self.size_px, width), self.pad_colour)
        tall.paste(narrow, (0, (width - height) // 2))
        return tall.resize((self.size_px, self.size_px), resample=RESAMPLE[self.resample])

    def _padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.pad_colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The mean colour in [0, 255], rounded down."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue


@functools.lru_cache(maxsize=16)
def _tables(mean: Triple, std: Triple) -> tuple[npt.NDArray[np.float32], ...]:
    # A pixel has 256 values: rescale and normalise them once, in the reference's own order and
    # precision (float64 product, rounded to float32, then float32 arithmetic).
    scaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * (1 / 255)).astype(np.float32)
    return tuple((scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True))


def probe(image: ImageLike, plan: ImagePlan) -> tuple[int, int]:
    """Returns (height, width) of an image from its header; no pixel is decoded.

    Args:
        image: The file, or an image already in memory.
        plan: Carries the limit on the number of pixels.

    Raises:
        ImageError: The file is missing, empty, no image, cut off, animated or too large.
    """
    if isinstance(image, Image.Image):
        plan.check_size(image.height, image.width, name="image in memory")
        return image.height, image.width
    with _open(image) as opened:
        width, height = opened.size
        if _orientation(opened) >= 5:
            width, height = height, width
        plan.check_size(height, width, name=image.name)
        _check_trailer(opened, image)
    return height, width


def load(image: ImageLike, plan: ImagePlan) -> Image.Image:
    """Returns the decoded image, upright and in mode RGB.

    Args:
        image: The file, or an image already in memory.
        plan: Carries the limit on the number of pixels.

    Raises:
        ImageError: As `probe`, and when the pixels cannot be decoded.
    """
    if isinstance(image, Image.Image):
        plan.check_size(image.height, image.width, name="image in memory")
        return _to_rgb(image, name="image in memory")
    with _open(image) as opened:
        plan.check_size(opened.height, opened.width, name=image.name)
        _check_trailer(opened, image)
        orientation = _orientation(opened)
        size = (opened.height, opened.width)
        try:
            least = plan.draft_size(*size)
            if least is not None and opened.format in ("JPEG", "MPO"):
                opened.draft("RGB", least)
            opened.load()
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ImageError(
                f"the pixels cannot be decoded: {error}",
                reason="image_corrupt",
                where=image.name,
                fix="replace the file",
            ) from error
        upright = _to_rgb(opened, name=image.name)
        upright.info[_FULL_SIZE] = size
    if orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
        if orientation >= 5:
            upright.info[_FULL_SIZE] = size[::-1]
    return upright


def full_size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) of the file that an image was loaded from.

    Args:
        image: From `load`; after a scaled decode it is smaller than its file.
    """
    size: tuple[int, int] = image.info.get(_FULL_SIZE, (image.height, image.width))
    return size


def pixels_of(image: ImageLike, plan: ImagePlan) -> npt.NDArray[np.float32]:
    """Returns the tower's input for an image: float32 [3, Y, X]."""
    return plan.apply(load(image, plan))


def _open(ref: ImageRef) -> Image.Image:
    try:
        # Pillow closes what it opened itself; other files close with their last reference.
        is_file = ref.content is None and ref.span is None
        if is_file:
            require_file(ref)
        opened = Image.open(ref.path if is_file else open_bytes(ref), formats=_FORMATS)
    except FileNotFoundError as error:
        raise ImageError(
            "the image is not there",
            reason="image_missing",
            where=ref.name,
            expected=str(ref.path),
            fix="fetch the image, or name its folder: --images, or data.train[].images in a recipe",
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"more pixels than can be decoded safely: {error}",
            reason="image_too_large",
            where=ref.name,
            fix="shrink the image",
        ) from error
    except UnidentifiedImageError as error:
        raise _not_an_image(ref) from error
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, OverflowError) as e:
        _check_unopened(ref)
        raise ImageError(
            f"the file cannot be opened as an image: {e}",
            reason="image_unreadable",
            where=ref.name,
            fix="replace the file",
        ) from e
    try:
        _check_frames(opened, ref)
    except ImageError:
        opened.close()
        raise
    return opened


def _not_an_image(ref: ImageRef) -> ImageError:
    if ref.content is None and ref.path.is_dir():
        what, reason = "this is a folder, not an image", "image_unreadable"
    elif _is_empty(ref):
        what, reason = "the file is empty (0 bytes)", "image_empty"
    else:
        what, reason = "the file is not an image in a format that is known", "image_unreadable"
    return ImageError(what, reason=reason, where=ref.name, fix="replace the file")


def _is_empty(ref: ImageRef) -> bool:
    with open_bytes(ref) as file:
        return not file.read(1)


def _check_unopened(ref: ImageRef) -> None:
    # Pillow reads a WebP file whole, so one that is cut off fails before its format is known.
    try:
        with open_bytes(ref) as file:
            head = file.read(12)
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                _check_end(file, "WEBP", ref)
    except OSError:
        return  # the caller says that it cannot be opened


def _check_frames(opened: Image.Image, ref: ImageRef) -> None:
    if opened.format in ("JPEG", "MPO", "BMP") or not getattr(opened, "is_animated", False):
        return
    raise ImageError(
        f"the file has {getattr(opened, 'n_frames', 'several')} frames",
        reason="image_animated",
        where=ref.name,
        fix="save the frame that is meant as an image of its own",
    )


def _orientation(opened: Image.Image) -> int:
    # Only what the header carries: asking Pillow for the EXIF block of a PNG that has none there
    # would decode the picture to look behind it.
    if "exif" not in opened.info and opened.format not in ("TIFF", "MPO"):
        return 1
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_trailer(opened: Image.Image, ref: ImageRef) -> None:
    # Looks through the handle that Pillow holds already, and leaves it where it was.
    file = getattr(opened, "fp", None)  # Pillow's own attribute; gone once a file is read whole
    if file is None or opened.format not in _END_MARKS:
        return
    before = file.tell()
    _check_end(file, opened.format, ref)
    file.seek(before)


def _check_end(file: IO[bytes], format: str, ref: ImageRef) -> None:
    """Finds a file that was cut off, without decoding: its end is not there."""
    size = file.seek(0, os.SEEK_END)
    if format == "WEBP":
        file.seek(4)
        whole = size >= int.from_bytes(file.read(4), "little") + 8
    else:
        mark = _END_MARKS[format]
        file.seek(-min(16, size), os.SEEK_END)
        whole = mark in file.read()
        if not whole:  # some writers append bytes behind the end
            file.seek(-min(_TAIL_BYTES, size), os.SEEK_END)
            whole = mark in file.read()
    if not whole:
        raise ImageError(
            f"the file is cut off: its {size} bytes hold no end of image",
            reason="image_truncated",
            where=ref.name,
            fix="fetch the image again",
        )


def _to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        return _from_16_bit(image, name=name)
    if mode == "F":
        raise ImageError(
            "pixels in floating point have no stated range",
            reason="image_mode_unsupported",
            where=name,
            fix="save the image with 8 bits a channel",
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image, *, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError(
            "grey values lie outside 16 bits",
            reason="image_mode_unsupported",
            where=name,
            got=f"{values.min()} to {values.max()}",
            expected="0 to 65535",
            fix="save the image with 8 bits a channel",
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    return Image.fromarray(grey).convert("RGB")

"""The resize of the `fast` and `scaled` image plans: Pillow's filters on vector units.

torch resizes 8-bit images with the filters and the order of passes that Pillow uses (columns, then
rows, each rounded to 8 bits), in 16-bit instead of 32-bit weights: a value may differ by 2 levels
of 255, and does so in about one of a thousand. The picture is handed over without a copy.

torch is imported by the first picture and not before: reading headers needs none of it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    import torch

VECTOR_FILTERS = ("bilinear", "bicubic")
"""Filters there are."""

_Filter = Literal["bilinear", "bicubic"]


def squared(
    image: Image.Image,
    *,
    mode: Literal["crop", "pad", "resize"],
    size_px: int,
    resample: _Filter,
    pad_colour: tuple[int, int, int],
    full_size: tuple[int, int],
) -> npt.NDArray[np.uint8]:
    """Returns the square that a vision tower sees.

    Args:
        image: A Pillow image in mode RGB.
        mode: As in `ImagePlan`.
        size_px: Side of the square.
        resample: The filter.
        pad_colour: Colour of the padding in [0, 255].
        full_size: (height, width) of the file; more than the image's own after a scaled decode.

    Returns:
        uint8 [Y, X, 4]; the fourth channel means nothing.
    """
    pixels, owner = _shared(image)
    width, height = image.size
    if mode == "resize" or width == height:
        out = _resize(pixels, size_px, size_px, resample)
    elif mode == "crop":
        out = _cropped(pixels, size_px, resample, full_size)
    else:
        out = _padded(pixels, size_px, resample, pad_colour)
    del owner  # the pixels were its until here
    return out


def normalised(
    pixels: npt.NDArray[np.uint8],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> npt.NDArray[np.float32]:
    """Returns pixels as the tower takes them, in one pass.

    Args:
        pixels: uint8 [Y, X, 4].
        mean: Per-channel mean, on pixels in [0, 1].
        std: Per-channel standard deviation, on pixels in [0, 1].

    Returns:
        float32 [3, Y, X].
    """
    scale = (1 / (255 * np.array(std))).astype(np.float32)[:, None, None]
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)[:, None, None]
    out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    np.multiply(pixels.transpose(2, 0, 1)[:3], scale, out=out)
    out += shift
    return out


def _cropped(
    pixels: npt.NDArray[np.uint8], size: int, resample: _Filter, full_size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    height, width = full_size
    new_height = int(size * height / width) if height > width else size
    new_width = int(size * width / height) if width > height else size
    whole = _resize(pixels, new_height, new_width, resample)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return whole[top : top + size, left : left + size]


def _padded(
    pixels: npt.NDArray[np.uint8],
    size: int,
    resample: _Filter,
    colour: tuple[int, int, int],
) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    long = max(height, width)
    begin = (long - min(height, width)) // 2
    fill = np.array([*colour, 255], dtype=np.uint8).view(np.uint32)[0]  # four channels at once
    canvas = np.full((long, long), fill).view(np.uint8).reshape(long, long, 4)
    if height > width:
        canvas[:, begin : begin + width] = pixels
    else:
        canvas[begin : begin + height] = pixels
    return _resize(canvas, size, size, resample)


def _resize(
    pixels: npt.NDArray[np.uint8], height: int, width: int, resample: _Filter
) -> npt.NDArray[np.uint8]:
    import torch

    if pixels.shape[:2] == (height, width):
        return pixels.copy()  # Pillow's own are gone with the image
    image_1CYX: torch.Tensor = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    out = torch.nn.functional.interpolate(
        image_1CYX, size=(height, width), mode=resample, antialias=True
    )
    return out[0].permute(1, 2, 0).numpy()


class _ArrowArray(ctypes.Structure):
    """The C structure of the Arrow data interface, as far as it is read here."""

    _fields_ = [
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    ]


def _shared(image: Image.Image) -> tuple[npt.NDArray[np.uint8], Any]:
    """Returns Pillow's own pixels, uint8 [Y, X, 4], and what keeps them alive."""
    try:
        _, owner = image.__arrow_c_array__()
    except ValueError:  # Pillow holds large pictures in several blocks
        pixels = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=np.uint8)
        return pixels.reshape(image.height, image.width, 4), None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    outer = _ArrowArray.from_address(pointer(owner, b"arrow_array"))
    inner = _ArrowArray.from_address(outer.children[0])
    number = image.width * image.height * 4
    buffer = (ctypes.c_uint8 * number).from_address(inner.buffers[1])
    return np.ctypeslib.as_array(buffer).reshape(image.height, image.width, 4), owner

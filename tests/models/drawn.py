"""Pictures drawn for training tests: a disc of one of four colours. Not a test."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = ((200, 40, 40), (40, 160, 60), (50, 70, 210), (220, 190, 40))


def drawn_images(num_images: int, *, side_px: int, seed: int) -> tuple[Tensor, list[int]]:
    """Returns normalised pictures [N, 3, Y, X] and the colour each shows."""
    random = np.random.default_rng(seed)
    pictures, colours = [], []
    for index in range(num_images):
        colour = index % len(COLOURS)
        canvas = Image.new("RGB", (side_px, side_px), tuple(random.integers(0, 60, 3).tolist()))
        x, y = random.integers(0, side_px // 2, 2).tolist()
        half = side_px // 2
        ImageDraw.Draw(canvas).ellipse((x, y, x + half, y + half), fill=COLOURS[colour])
        pixels = np.asarray(canvas, dtype=np.float32) / 127.5 - 1.0
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
        colours.append(colour)
    return torch.stack(pictures), colours

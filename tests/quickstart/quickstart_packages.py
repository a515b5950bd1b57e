"""What the synthetic packages of these tests consist of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vistune.quickstart.shapes import COLOUR_NAMES, SHAPE_NAMES


@dataclass(frozen=True)
class Packages:
    easy_vqa: Path
    drawings: Path
    names: Path


def write_split(root: Path, split: str, *, num_images: int, first: int) -> None:
    (root / split / "images").mkdir(parents=True)
    colours, kinds = sorted(COLOUR_NAMES), sorted(SHAPE_NAMES)
    rows = []
    for number in range(num_images):
        colour, shape = colours[number % 8], kinds[number % 3]
        other = colours[(number + 3) % 8]
        rows += [
            ["what shape is in the image?", shape, number],
            ["what color is the shape?", colour, number],
            [f"is there a {colour} shape?", "yes", number],
            [f"is there a {other} shape?", "no", number],
            [f"is there not a {other} shape?", "yes", number],
        ]
        image = Image.new("RGB", (16, 16), "white")
        place = first + number
        ImageDraw.Draw(image).rectangle((2, 2, 6, 6), fill=(place % 256, place // 256, number))
        image.save(root / split / "images" / f"{number}.png")
    rows.append(["is there a red shape?", "no", num_images])  # settles nothing
    Image.new("RGB", (16, 16)).save(root / split / "images" / f"{num_images}.png")
    (root / split / "questions.json").write_text(json.dumps(rows))

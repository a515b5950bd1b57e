"""Photographs for training tests, from a package that is always installed. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

# Matplotlib's sample data: a photograph (public domain) and what is to be seen in its parts, with
# two pictures of another kind.
_SAMPLES = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data"
_PHOTO = "grace_hopper.jpg"
_PARTS = (
    ((0, 0, 512, 606), "a woman in uniform before a flag"),
    ((150, 20, 360, 150), "a navy cap"),
    ((170, 110, 350, 300), "a smiling face with glasses"),
    ((300, 400, 500, 600), "ribbons on a dark coat"),
    ((0, 0, 150, 420), "stripes of a flag"),
)
_OTHERS = (("Minduka_Present_Blue_Pack.png", "a blue present"), ("logo2.png", "the name of a tool"))


def write_real_pictures(folder: Path) -> dict[str, Any]:
    """Writes the pictures and a LLaVA-format file; returns the recipe's source."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(_SAMPLES / _PHOTO) as photo:
        found = [(photo.convert("RGB").crop(box), caption) for box, caption in _PARTS]
    for name, caption in _OTHERS:
        with Image.open(_SAMPLES / name) as picture:
            found.append((picture.convert("RGB"), caption))
    rows = []
    for index, (picture, caption) in enumerate(found):
        picture.save(folder / f"{index}.jpg", quality=92)
        turns = [
            {"from": "human", "value": "<image>\nwhat is it"},
            {"from": "gpt", "value": caption},
        ]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return {"format": "llava", "path": str(folder / "train.json"), "images": str(folder)}

"""Synthetic package trees: a tiny easy-VQA, a few drawings with names, random tower weights."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image, ImageDraw
from quickstart_packages import Packages, write_split

from vistune.models.towers.efficientnet_lite import LITE0_STAGES
from vistune.quickstart import scenes


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    root = tmp_path_factory.mktemp("packages")
    write_split(root / "easy", "train", num_images=60, first=0)
    write_split(root / "easy", "test", num_images=48, first=1000)
    (root / "drawings").mkdir()
    (root / "names").mkdir()
    english, chinese = {}, {}
    rng = random.Random(0)
    for points in (*scenes.SEEN_CODE_POINTS.values(), *scenes.UNSEEN_CODE_POINTS.values()):
        for point in points.split():
            symbol = chr(int(point, 16))
            english[symbol] = {"en": f":thing_{point}:"}
            chinese[symbol] = f":东西{point}:"
            art = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
            fill = tuple(rng.randrange(256) for _ in range(3))
            ImageDraw.Draw(art).ellipse((8, 8, 64, 64), fill=(*fill, 255))
            art.save(root / "drawings" / f"{point}.png")
    (root / "names" / "emoji.json").write_text(json.dumps(english))
    (root / "names" / "emoji_zh.json").write_text(json.dumps(chinese))
    return Packages(root / "easy", root / "drawings", root / "names")


@pytest.fixture
def released_lite0() -> dict[str, torch.Tensor]:
    """A state dict with the keys and shapes of the released EfficientNet-Lite0."""
    tensors: dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        tensors[f"{conv}.weight"] = torch.randn(shape) * 0.1
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{part}"] = torch.ones(shape[0])

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    width, number = 32, 0
    for kernel, _, expansion, num_out, repeats in LITE0_STAGES:
        for _ in range(repeats):
            name, wide = f"_blocks.{number}", width * expansion
            if expansion > 1:
                add(f"{name}._expand_conv", f"{name}._bn0", (wide, width, 1, 1))
            add(f"{name}._depthwise_conv", f"{name}._bn1", (wide, 1, kernel, kernel))
            add(f"{name}._project_conv", f"{name}._bn2", (num_out, wide, 1, 1))
            width, number = num_out, number + 1
    add("_conv_head", "_bn1", (1280, width, 1, 1))
    return tensors

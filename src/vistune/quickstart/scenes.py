"""Renders small scenes from Twemoji drawings and asks about them in English and Chinese.

A scene is one drawing, a pair side by side, or one to four copies of a drawing, on a plain
background, with random place, size and tilt. The names come from the package `emoji` (Unicode
CLDR). The scenes are synthetic; what is real is the art, the names and the words.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vistune.errors import DataError
from vistune.quickstart.shapes import Turn

CANVAS_PX = 128
KIND_NAMES = {"animal": "动物", "food": "食物", "vehicle": "交通工具"}
COUNT_NAMES = {1: ("one", "一个"), 2: ("two", "两个"), 3: ("three", "三个"), 4: ("four", "四个")}

# Code points by kind. Of each kind, the second list is never shown in training: its drawings are
# asked about only by kind, which tells recognition of an unseen thing from recall.
SEEN_CODE_POINTS = {
    "animal": (
        "1f400 1f402 1f405 1f407 1f408 1f40a 1f40c 1f40d 1f40e 1f411 1f412 1f413 1f415 1f416 1f418 "
        "1f419 1f41c 1f41d 1f41f 1f422 1f427 1f428 1f42a 1f42c 1f438 1f43a 1f43b 1f43c 1f980 1f981 "
        "1f984 1f986 1f987 1f988 1f989 1f98a 1f98b 1f992 1f993 1f998"
    ),
    "food": (
        "1f345 1f346 1f347 1f349 1f34a 1f34b 1f34c 1f34d 1f34e 1f350 1f351 1f352 1f353 1f354 1f355 "
        "1f35e 1f35f 1f363 1f369 1f36a 1f370 1f951 1f952 1f954 1f955 1f95a 1f965 1f966 1f96d 1f9c5"
    ),
    "vehicle": (
        "1f680 1f681 1f68b 1f68c 1f691 1f692 1f693 1f695 1f697 1f69a 1f69c 1f6a2 1f6a4 1f6b2"
    ),
}
UNSEEN_CODE_POINTS = {
    "animal": "1f404 1f406 1f410 1f417 1f42b 1f43f 1f985 1f98c 1f98d 1f98f 1f994 1f9a5 1f9a6 1f9a1",
    "food": "1f336 1f344 1f348 1f34f 1f359 1f36b 1f382 1f950 1f95d 1f95e 1f96a 1f96f 1f9c0 1f9c1",
    "vehicle": (
        "1f682 1f68d 1f68e 1f690 1f694 1f696 1f698 1f699 1f69b 1f686 1f684 1f3ce 1f3cd 1f6a0"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One Twemoji drawing and its names.

    Args:
        code_point: Hexadecimal code point, also the file's stem.
        path: The PNG file with transparency.
        kind: Key of `KIND_NAMES`.
        english: Its English name.
        chinese: Its Chinese name.
    """

    code_point: str
    path: Path
    kind: str
    english: str
    chinese: str

    def name(self, language: str) -> str:
        """The name in "en" or "zh"."""
        return self.chinese if language == "zh" else self.english


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A rendered scene and the questions that can be asked about it.

    Args:
        image: RGB image, `CANVAS_PX` square.
        turns: All its questions.
    """

    image: Image.Image
    turns: tuple[Turn, ...]


def read_drawings(
    assets: Path, names: Path, code_points: dict[str, str] | None = None
) -> list[Drawing]:
    """Reads drawings with their names.

    Args:
        assets: Folder of the 72 px PNG files, named by code point.
        names: Folder with `emoji.json` (English) and `emoji_zh.json` (Chinese).
        code_points: Space-separated code points by kind; the seen ones when left out.

    Raises:
        DataError: A drawing or one of its names is missing.
    """
    try:
        english = json.loads((names / "emoji.json").read_text("utf-8"))
        chinese = json.loads((names / "emoji_zh.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("cannot read the emoji names", where=str(names), got=error) from None
    drawings = []
    for kind, points in (SEEN_CODE_POINTS if code_points is None else code_points).items():
        for point in points.split():
            symbol = chr(int(point, 16))
            # Some symbols are listed only with the selector that asks for the coloured drawing.
            listed = symbol if symbol in chinese else f"{symbol}\ufe0f"
            path = assets / f"{point}.png"
            if listed not in english or listed not in chinese or not path.is_file():
                raise DataError("an emoji has no drawing or no name", where=f"U+{point}")
            drawings.append(
                Drawing(
                    code_point=point,
                    path=path,
                    kind=kind,
                    english=english[listed]["en"].strip(":").replace("_", " "),
                    chinese=chinese[listed].strip(":"),
                )
            )
    return drawings


def single(drawing: Drawing, rng: random.Random) -> Scene:
    """One drawing, large, anywhere."""
    canvas = _background(rng)
    size = rng.randint(64, 108)
    _paste(canvas, drawing, rng, size_px=size, centre=_inside(rng, size, 0, CANVAS_PX))
    turns: list[Turn] = []
    for language in ("en", "zh"):
        turns += [naming_turn(drawing, language, rng), kind_turn(drawing, language)]
    return Scene(image=canvas, turns=tuple(turns))


def pair(left: Drawing, right: Drawing, rng: random.Random) -> Scene:
    """Two drawings side by side."""
    canvas = _background(rng)
    half = CANVAS_PX // 2
    for index, drawing in enumerate((left, right)):
        size = rng.randint(48, 62)
        centre = _inside(rng, size, index * half, half)
        _paste(canvas, drawing, rng, size_px=size, centre=centre)
    turns = []
    for side, zh_side, drawing in (("left", "左边", left), ("right", "右边", right)):
        turns.append(
            Turn(
                question=f"What is on the {side}?",
                answer=drawing.english,
                type="position",
                language="en",
                topic=side,
            )
        )
        turns.append(
            Turn(
                question=f"{zh_side}是什么？",
                answer=drawing.chinese,
                type="position",
                language="zh",
                topic=side,
            )
        )
    english = f"{_article(left.english)} on the left and {_article(right.english).lower()}"
    turns.append(
        Turn(
            question="Describe the image.",
            answer=f"{english} on the right.",
            type="describe",
            language="en",
        )
    )
    turns.append(
        Turn(
            question="描述这张图片。",
            answer=f"左边是{left.chinese}，右边是{right.chinese}。",
            type="describe",
            language="zh",
        )
    )
    return Scene(image=canvas, turns=tuple(turns))


def several(drawing: Drawing, num: int, rng: random.Random) -> Scene:
    """One to four copies of a drawing, each in its own quarter of the image."""
    canvas = _background(rng)
    half = CANVAS_PX // 2
    for quarter in rng.sample(range(4), num):
        size = rng.randint(44, 60)
        x, y = half * (quarter % 2), half * (quarter // 2)
        centre = (_inside(rng, size, x, half)[0], _inside(rng, size, y, half)[0])
        _paste(canvas, drawing, rng, size_px=size, centre=centre)
    english, chinese = COUNT_NAMES[num]
    return Scene(
        image=canvas,
        turns=(
            Turn(question="How many are there?", answer=english, type="count", language="en"),
            Turn(question="图中有几个？", answer=chinese, type="count", language="zh"),
            naming_turn(drawing, "en", rng),
            naming_turn(drawing, "zh", rng),
        ),
    )


def naming_turn(drawing: Drawing, language: str, rng: random.Random) -> Turn:
    """The question what is shown."""
    if language == "zh":
        question = rng.choice(["图中是什么？", "图片里有什么？"])
    else:
        question = rng.choice(["What is in the image?", "What does the image show?"])
    return Turn(question=question, answer=drawing.name(language), type="name", language=language)


def kind_turn(drawing: Drawing, language: str) -> Turn:
    """The question whether it is an animal, a food or a vehicle."""
    if language == "zh":
        question = "这是动物、食物还是交通工具？"
        return Turn(question=question, answer=KIND_NAMES[drawing.kind], type="kind", language="zh")
    question = "Is it an animal, a food or a vehicle?"
    return Turn(question=question, answer=drawing.kind, type="kind", language="en")


def captions(drawing: Drawing) -> tuple[str, str]:
    """The English and the Chinese caption of a single drawing."""
    return f"{_article(drawing.english)}.", f"一个{drawing.chinese}。"


def _article(name: str) -> str:
    return f"{'An' if name[0].lower() in 'aeio' else 'A'} {name}"


def _background(rng: random.Random) -> Image.Image:
    colour = tuple(rng.randint(200, 255) for _ in range(3))
    return Image.new("RGB", (CANVAS_PX, CANVAS_PX), colour)


def _inside(rng: random.Random, size_px: int, start_px: int, extent_px: int) -> tuple[int, int]:
    """A centre whose box lies in [start, start + extent] across and anywhere inside down."""
    reach = size_px // 2
    x = start_px + rng.randint(min(reach, extent_px // 2), max(extent_px - reach, extent_px // 2))
    y = rng.randint(min(reach, CANVAS_PX // 2), max(CANVAS_PX - reach, CANVAS_PX // 2))
    return x, y


def _paste(
    canvas: Image.Image,
    drawing: Drawing,
    rng: random.Random,
    *,
    size_px: int,
    centre: tuple[int, int],
) -> None:
    with Image.open(drawing.path) as file:
        art = file.convert("RGBA")
    art = art.resize((size_px, size_px), Image.Resampling.BICUBIC)
    art = art.rotate(rng.uniform(-12.0, 12.0), Image.Resampling.BICUBIC)
    corner = (centre[0] - size_px // 2, centre[1] - size_px // 2)
    canvas.paste(art, corner, art)

"""Reads the published easy-VQA set: one coloured shape per image, several questions about it.

It turns the published questions and answers into questions in English and Chinese and into
captions. It invents no label: the colour and shape of an image are what its published answers
say, and an image whose answers do not settle both is left out and counted.

Source: the package easy-vqa, version 1.0.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vistune.errors import DataError

COLOUR_NAMES = {
    "black": "黑色",
    "blue": "蓝色",
    "brown": "棕色",
    "gray": "灰色",
    "green": "绿色",
    "red": "红色",
    "teal": "青色",
    "yellow": "黄色",
}
SHAPE_NAMES = {"circle": "圆形", "rectangle": "矩形", "triangle": "三角形"}

_SHAPE_QUESTIONS_ZH = ("图中是什么形状？", "图片里有什么形状？")
_COLOUR_QUESTIONS_ZH = ("图中的形状是什么颜色？", "图片里的图形是什么颜色？")
_CAPTION_QUESTION = "Describe the image."
_CAPTION_QUESTION_ZH = "描述这张图片。"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question about an image.

    Args:
        question: The question without an image marker.
        answer: The short answer to learn or to be scored against.
        type: What kind of question it is, for scores by type.
        language: "en" or "zh".
        topic: What it asks about, the same in both languages; "" where that is the type.
    """

    question: str
    answer: str
    type: str
    language: str
    topic: str = ""


@dataclass(frozen=True, kw_only=True)
class ShapeImage:
    """One easy-VQA image whose colour and shape its published answers settle.

    Args:
        number: The published image number.
        path: The image file.
        colour: Key of `COLOUR_NAMES`.
        shape: Key of `SHAPE_NAMES`.
        questions: Published (question, answer) pairs.
    """

    number: int
    path: Path
    colour: str
    shape: str
    questions: tuple[tuple[str, str], ...]


def read_split(root: Path, split: str) -> tuple[list[ShapeImage], int]:
    """Reads one published split.

    Args:
        root: The folder that holds `train` and `test`.
        split: "train" or "test".

    Returns:
        The images whose colour and shape are settled, by number, and how many were left out.

    Raises:
        DataError: `questions.json` is missing, malformed or contradicts itself.
    """
    path = root / split / "questions.json"
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("cannot read the questions", where=str(path), got=error) from None
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in rows:
        by_image[int(number)].append((str(question), str(answer)))
    images: list[ShapeImage] = []
    for number, pairs in sorted(by_image.items()):
        colours, shapes = _settled(pairs)
        if len(colours) > 1 or len(shapes) > 1:
            raise DataError(
                "the published answers contradict each other",
                where=f"{path}, image {number}",
                got=f"{sorted(colours)} {sorted(shapes)}",
                expected="one colour and one shape",
            )
        if colours and shapes:
            images.append(
                ShapeImage(
                    number=number,
                    path=root / split / "images" / f"{number}.png",
                    colour=colours.pop(),
                    shape=shapes.pop(),
                    questions=tuple(pairs),
                )
            )
    return images, len(by_image) - len(images)


def _settled(pairs: Iterable[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """Colours and shapes that the answers say are in the image."""
    colours: set[str] = set()
    shapes: set[str] = set()
    for question, answer in pairs:
        words = re.findall(r"[a-z]+", question)
        if answer in SHAPE_NAMES or answer in COLOUR_NAMES:
            # "what is the red shape?" and "what color is the circle?" name the other attribute.
            named = [answer, *words]
        elif (answer == "yes") != is_negated(question):
            named = words
        else:
            continue
        colours.update(word for word in named if word in COLOUR_NAMES)
        shapes.update(word for word in named if word in SHAPE_NAMES)
    return colours, shapes


def is_negated(question: str) -> bool:
    """Whether a yes-no question asks for an absence ("is there not a blue shape?")."""
    return bool({"no", "not"} & set(re.findall(r"[a-z]+", question)))


def captions(image: ShapeImage) -> tuple[str, str]:
    """The English and the Chinese caption of an image."""
    return (
        f"A {image.colour} {image.shape}.",
        f"一个{COLOUR_NAMES[image.colour]}的{SHAPE_NAMES[image.shape]}。",
    )


def caption_turn(image: ShapeImage, *, chinese: bool) -> Turn:
    """The request to describe an image, with its caption."""
    english, mandarin = captions(image)
    if chinese:
        return Turn(question=_CAPTION_QUESTION_ZH, answer=mandarin, type="describe", language="zh")
    return Turn(question=_CAPTION_QUESTION, answer=english, type="describe", language="en")


def published_turns(image: ShapeImage) -> list[Turn]:
    """The published open questions of an image: its shape and its colour.

    The yes-no questions, eight in ten of the published set, are left out: guessing answers two
    thirds of them, so they tell little about sight.
    """
    turns = []
    for question, answer in image.questions:
        if answer in SHAPE_NAMES or answer in COLOUR_NAMES:
            kind = "shape" if answer in SHAPE_NAMES else "colour"
            asked = f"{question[0].upper()}{question[1:]}"
            turns.append(Turn(question=asked, answer=answer, type=kind, language="en"))
    return turns


def chinese_turns(image: ShapeImage, rng: random.Random) -> list[Turn]:
    """The shape and the colour question in Chinese."""
    return [
        Turn(
            question=rng.choice(_SHAPE_QUESTIONS_ZH),
            answer=SHAPE_NAMES[image.shape],
            type="shape",
            language="zh",
        ),
        Turn(
            question=rng.choice(_COLOUR_QUESTIONS_ZH),
            answer=COLOUR_NAMES[image.colour],
            type="colour",
            language="zh",
        ),
    ]


def all_turns(image: ShapeImage, rng: random.Random) -> list[Turn]:
    """Every question about an image in both languages, the request to describe it included."""
    described = [caption_turn(image, chinese=chinese) for chinese in (False, True)]
    return [*published_turns(image), *chinese_turns(image, rng), *described]


def one_per_topic(turns: Iterable[Turn], rng: random.Random) -> list[Turn]:
    """One turn of each topic, in a random language and order.

    A second question on the same topic could be answered from the first answer, without looking.
    """
    by_topic: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        by_topic[turn.topic or turn.type].append(turn)
    chosen = []
    for group in by_topic.values():
        language = rng.choice(sorted({turn.language for turn in group}))
        chosen.append(rng.choice([turn for turn in group if turn.language == language]))
    rng.shuffle(chosen)
    return chosen


def held_out(
    images: Sequence[ShapeImage],
    rng: random.Random,
    *,
    num_per_type: int,
    languages: Sequence[str],
) -> list[tuple[ShapeImage, Turn]]:
    """Questions about the published test images, every answer of a type equally often.

    Args:
        images: Images of the published test split, none of them seen in training.
        rng: Source of the choices.
        num_per_type: Questions per type and language; the English questions are the published
            ones, the Chinese ones are rendered from the same labels.
        languages: Of "en" and "zh".

    Returns:
        (image, turn) pairs; no image is asked twice for the same type and language.
    """
    chosen: list[tuple[ShapeImage, Turn]] = []
    for language in languages:
        by_answer: dict[tuple[str, str], list[tuple[ShapeImage, Turn]]] = defaultdict(list)
        for image in images:
            turns = published_turns(image) if language == "en" else chinese_turns(image, rng)
            rng.shuffle(turns)
            for turn in {(turn.type, turn.answer): turn for turn in turns}.values():
                by_answer[turn.type, turn.answer].append((image, turn))
        for kind in ("shape", "colour"):
            groups = [rows for (name, _), rows in sorted(by_answer.items()) if name == kind]
            chosen.extend(_balanced(groups, rng, num=num_per_type))
    return chosen


def _balanced(
    groups: Sequence[list[tuple[ShapeImage, Turn]]], rng: random.Random, *, num: int
) -> list[tuple[ShapeImage, Turn]]:
    """Draws equally from every answer's group, never the same image twice."""
    if not groups:
        return []
    used: set[int] = set()
    drawn: list[tuple[ShapeImage, Turn]] = []
    for group in groups:
        rng.shuffle(group)
        fresh = [row for row in group if row[0].number not in used][: num // len(groups)]
        used.update(row[0].number for row in fresh)
        drawn.extend(fresh)
    return drawn

"""A dataset file in the shape of the public 665k instruction mix, made of made-up words.

    python bench/mix665k.py OUT_FOLDER [--rows 665298]

The parts, their numbers of rows and rounds, how they ask and how long they answer follow the public
description of the mix (665,298 rows, 40,688 of them text only); the words do not. Words are drawn
from 60,000 made-up ones with Zipf frequencies, and one word in fifty is spelt anew (names, numbers,
typing errors), so that looking words up is neither harder nor easier than in real text. Images are
small JPEG files that rows share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_ROWS = 665_298
NUM_IMAGES = 512
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_CAPTION = "Provide a one-sentence caption for the provided image.\nReference OCR token: "
_REGION = "Please provide a short description for this region: "
_BOX = "Please provide the bounding box coordinate of the region this sentence describes: "

Round = tuple[str, str]


class Writer:
    """Draws texts; the same seed gives the same texts."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        lexicon = np.random.default_rng(99)
        syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "ou", "er")]
        sizes = lexicon.integers(1, 5, 60_000)
        self.words = np.array(["".join(lexicon.choice(syllables, n)) for n in sizes], dtype=object)
        weights = 1 / (np.arange(60_000) + 2.7) ** 1.05
        self.cut = np.cumsum(weights / weights.sum())

    def text(self, number: int) -> str:
        words = self.words[np.searchsorted(self.cut, self.rng.random(number))].tolist()
        fresh = self.rng.random(number)
        for k in np.flatnonzero(fresh < 0.02):
            words[k] += str(self.rng.integers(10_000))
        for k in np.flatnonzero(fresh > 0.88):
            words[k] += "," if fresh[k] < 0.95 else "."
        return " ".join(words)

    def long(self, median: float, spread: float, most: int) -> str:
        number = int(np.exp(self.rng.normal(np.log(median), spread)).clip(3, most))
        return self.text(number).capitalize() + "."

    def rounds(self, mean: float, most: int) -> int:
        return int(min(1 + self.rng.poisson(mean - 1), most))

    def box(self) -> str:
        return "[" + ", ".join(f"{v:.2f}" for v in self.rng.random(4)) + "]"

    def question(self) -> str:
        return self.text(int(self.rng.integers(5, 12))).capitalize() + "?"

    def short(self) -> str:
        return self.text(1 if self.rng.random() < 0.8 else 2).capitalize()


def _talks(w: Writer) -> list[Round]:
    kind = w.rng.random()
    if kind < 0.36:  # conversation
        return [(w.question(), w.long(22, 0.6, 120)) for _ in range(w.rounds(4, 8))]
    return [(w.question(), w.long(95 if kind < 0.51 else 105, 0.35, 300))]


def _chats(w: Writer) -> list[Round]:
    rounds = w.rounds(5, 12)
    return [(w.long(18, 1.1, 400), _paragraphs(w)) for _ in range(rounds)]


def _paragraphs(w: Writer) -> str:
    return "\n\n".join(w.long(40, 0.7, 200) for _ in range(int(w.rng.integers(1, 8))))


def _short_rounds(mean: float, most: int) -> Callable[[Writer], list[Round]]:
    def make(w: Writer) -> list[Round]:
        number = w.rounds(mean, most)
        return [
            (w.question() + (_SHORT if k == 0 or w.rng.random() < 0.3 else ""), w.short())
            for k in range(number)
        ]

    return make


def _letters(w: Writer) -> list[Round]:
    options = "".join(f"\n{c}. {w.short()}" for c in "ABCD")
    return [(w.question() + options + _LETTER, str(w.rng.choice(list("ABCD"))))]


def _captions(w: Writer) -> list[Round]:
    return [(_CAPTION + ", ".join(w.text(12).split()), w.long(12, 0.3, 40))]


def _regions(w: Writer) -> list[Round]:
    return [(_REGION + w.box(), w.text(3).capitalize()) for _ in range(w.rounds(4, 20))]


def _boxes(w: Writer) -> list[Round]:
    rounds: list[Round] = []
    for _ in range(w.rounds(7, 20)):
        if w.rng.random() < 0.5:
            rounds.append((_BOX + w.text(5), w.box()))
        else:
            rounds.append((_REGION + w.box(), w.text(5).capitalize()))
    return rounds


PARTS: tuple[tuple[str, int, Callable[[Writer], list[Round]]], ...] = (
    ("coco", 157_712, _talks),
    ("", 40_688, _chats),
    ("vqa", 82_783, _short_rounds(5.4, 30)),
    ("gqa", 72_140, _short_rounds(13, 40)),
    ("okvqa", 8_998, _short_rounds(1, 1)),
    ("ocr_vqa", 80_000, _short_rounds(5, 8)),
    ("aokvqa", 66_160, _letters),
    ("textcaps", 21_953, _captions),
    ("refcoco", 48_447, _regions),
    ("vg", 86_417, _boxes),
)
"""Name, rows and rounds of every part; the one without a name has no images."""


def rows(number: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yields `number` rows, the parts mixed as in the whole."""
    w = Writer(seed)
    counts = np.array([part[1] for part in PARTS], dtype=np.float64)
    order = w.rng.choice(len(PARTS), number, p=counts / counts.sum())
    for k, part in enumerate(order.tolist()):
        name, _, make = PARTS[part]
        talk = []
        for question, answer in make(w):
            value = f"<image>\n{question}" if name and not talk else question
            talk.append({"from": "human", "value": value})
            talk.append({"from": "gpt", "value": answer})
        row: dict[str, Any] = {"id": f"{name or 'chat'}_{k:09d}"}
        if name:
            row["image"] = f"images/{k % NUM_IMAGES:06d}.jpg"
        yield {**row, "conversations": talk}


def write(folder: Path, number: int) -> Path:
    """Writes images and a JSON list of rows; a file that is there already is kept."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        path = images / f"{k:06d}.jpg"
        if not path.exists():
            height, width = rng.integers(200, 640, 2)
            noise = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((int(width), int(height))).save(path, quality=85)
    path = folder / f"mix_{number}.json"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for k, row in enumerate(rows(number)):
                file.write(("[" if k == 0 else ",\n") + json.dumps(row))
            file.write("]")
        part.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    options = parser.parse_args()
    path = write(options.folder, options.rows)
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()

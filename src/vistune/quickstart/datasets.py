"""Builds the embedded default's training and held-out files from fetched packages.

Training files are in LLaVA's conversation format, held-out files one question per JSON line. It
does not train and does not score. The same seed gives the same bytes, and no held-out image has
the pixels of a training image (checked; the run stops otherwise).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vistune.errors import DataError
from vistune.quickstart import scenes, shapes
from vistune.quickstart.scenes import Drawing, Scene
from vistune.quickstart.shapes import ShapeImage, Turn

MAX_TURNS = 3
_IMAGE = "<image>\n"
_STAGE1, _STAGE2, _HELDOUT = "stage1.json", "stage2.json", "heldout.jsonl"
_CARD, _IMAGES = "card.json", "images"
# Plain exchanges, English and Chinese in turn, so that a turn without an image stays ordinary.
_TEXT_ROWS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("一年有几个月？", "一年有十二个月。"),
    ("What is two plus three?", "Two plus three is five."),
    ("二加三等于几？", "二加三等于五。"),
    ("What do bees make?", "Bees make honey."),
    ("蜜蜂酿造什么？", "蜜蜂酿造蜂蜜。"),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("冬天之后是什么季节？", "冬天之后是春天。"),
    ("What do we call frozen water?", "Frozen water is called ice."),
    ("结冰的水叫什么？", "结冰的水叫冰。"),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("我们住在哪个星球上？", "我们住在地球上。"),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("“热”的反义词是什么？", "“热”的反义词是“冷”。"),
)


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """How much of what to build.

    Args:
        seed: Decides every random choice.
        stage1_shapes: Captioned easy-VQA images in stage 1.
        stage1_drawings: Captioned single drawings in stage 1.
        stage2_shapes: easy-VQA conversations in stage 2.
        stage2_singles: Conversations about one drawing in stage 2.
        stage2_pairs: Conversations about two drawings side by side in stage 2.
        stage2_several: Conversations about one to four copies of a drawing in stage 2.
        text_repeats: How often each text-only exchange appears in stage 2.
        heldout_per_type: Held-out questions per type and language.
        languages: Languages asked and answered in, of "en" and "zh".
    """

    seed: int = 18
    stage1_shapes: int = 800
    stage1_drawings: int = 2000
    stage2_shapes: int = 1000
    stage2_singles: int = 1000
    stage2_pairs: int = 850
    stage2_several: int = 450
    text_repeats: int = 3
    heldout_per_type: int = 48
    languages: tuple[str, ...] = ("en", "zh")


@dataclass(frozen=True, kw_only=True)
class BuiltDatasets:
    """Where the built files are and what they hold.

    Args:
        stage1: LLaVA-format captions for the connector.
        stage2: LLaVA-format conversations for instruction tuning.
        heldout: One question per line: id, image, question, answers, type, language.
        images: Folder that the rows' image paths start from.
        card: JSON with the plan, the counts and what was left out.
        counts: Rows and questions by file and type.
    """

    stage1: Path
    stage2: Path
    heldout: Path
    images: Path
    card: Path
    counts: dict[str, int]


class _ImageFolder:
    """Writes images once and knows the pixels of each split."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pixels: dict[str, set[str]] = {"train": set(), "heldout": set()}

    def add(self, image: Image.Image, name: str, *, split: str) -> str:
        """Writes an image and returns its path relative to the folder."""
        rgb = image.convert("RGB")
        self.pixels[split].add(pixel_hash(rgb))
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rgb.save(path, format="PNG", compress_level=4)
        return name

    def add_file(self, source: Path, name: str, *, split: str) -> str:
        """Copies an image and returns its path relative to the folder."""
        with Image.open(source) as image:
            return self.add(image, name, split=split)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's size and RGB values, whatever file format it came from."""
    rgb = image.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


def build_datasets(
    destination: Path,
    *,
    easy_vqa: Path,
    drawings: Path,
    names: Path,
    plan: DatasetPlan | None = None,
) -> BuiltDatasets:
    """Builds all files of the embedded default.

    Args:
        destination: Empty folder to fill.
        easy_vqa: Folder of the package easy-vqa that holds `train` and `test`.
        drawings: Folder of Twemoji's 72 px PNG files.
        names: Folder of the package emoji that holds `emoji.json` and `emoji_zh.json`.
        plan: How much to build.

    Raises:
        DataError: A source is missing or malformed, a plan asks for more than there is, or a
            held-out image has the pixels of a training image.
    """
    plan = plan or DatasetPlan()
    folder = _ImageFolder(destination / _IMAGES)
    train, train_unsettled = shapes.read_split(easy_vqa, "train")
    test, test_unsettled = shapes.read_split(easy_vqa, "test")
    seen = scenes.read_drawings(drawings, names)
    unseen = scenes.read_drawings(drawings, names, scenes.UNSEEN_CODE_POINTS)
    stage1 = _stage1(folder, train, seen, plan)
    stage2 = _stage2(folder, train, seen, plan)
    test, num_repeated = _without_repeats(test, folder.pixels["train"])
    heldout = _heldout(folder, test, seen, unseen, plan)
    overlap = folder.pixels["train"] & folder.pixels["heldout"]
    if overlap:
        raise DataError(
            "held-out images have the pixels of training images",
            got=f"{len(overlap)} images",
            expected="0",
            fix="choose another seed",
        )
    counts = {
        "stage1_rows": len(stage1),
        "stage2_rows": len(stage2),
        "stage2_questions": sum(len(_turns_of(row)) // 2 for row in stage2),
        "heldout_questions": len(heldout),
        "left_out_unsettled": train_unsettled + test_unsettled,
        "left_out_test_image_also_in_training": num_repeated,
    }
    kinds = Counter(f"heldout {row['type']} {row['language']}" for row in heldout)
    counts.update(sorted(kinds.items()))
    _write_lines(destination / _STAGE1, stage1, as_list=True)
    _write_lines(destination / _STAGE2, stage2, as_list=True)
    _write_lines(destination / _HELDOUT, heldout, as_list=False)
    card = {"plan": asdict(plan), "counts": counts}
    (destination / _CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return built_in(destination)


def built_in(folder: Path) -> BuiltDatasets:
    """The files that `build_datasets` wrote into a folder.

    Args:
        folder: What was given as `destination`.
    """
    card = json.loads((folder / _CARD).read_text("utf-8"))
    return BuiltDatasets(
        stage1=folder / _STAGE1,
        stage2=folder / _STAGE2,
        heldout=folder / _HELDOUT,
        images=folder / _IMAGES,
        card=folder / _CARD,
        counts=card["counts"],
    )


Row = dict[str, object]


def _turns_of(row: Row) -> list[object]:
    turns = row["conversations"]
    assert isinstance(turns, list)
    return turns


def _rng(plan: DatasetPlan, part: str) -> random.Random:
    """A stream of its own for each part: changing one part's size leaves the others alone."""
    return random.Random(f"{plan.seed}/{part}")


def conversation_row(row_id: str, image: str | None, turns: Sequence[Turn]) -> Row:
    """A row in LLaVA's format; the image marker stands in the first question."""
    messages = []
    for index, turn in enumerate(turns):
        marker = _IMAGE if index == 0 and image is not None else ""
        messages.append({"from": "human", "value": f"{marker}{turn.question}"})
        messages.append({"from": "gpt", "value": turn.answer})
    row: Row = {"id": row_id, "conversations": messages}
    if image is not None:
        row["image"] = image
    return row


def _caption_row(row_id: str, image: str, caption: str, *, language: str) -> Row:
    question = "描述这张图片。" if language == "zh" else "Describe the image."
    turn = Turn(question=question, answer=caption, type="describe", language=language)
    return conversation_row(row_id, image, [turn])


def _take(images: Sequence[ShapeImage], num: int, rng: random.Random) -> list[ShapeImage]:
    if num > len(images):
        raise DataError(
            "the plan asks for more images than the package has", got=num, expected=len(images)
        )
    return rng.sample(list(images), num)


def _stage1(
    folder: _ImageFolder, train: Sequence[ShapeImage], seen: Sequence[Drawing], plan: DatasetPlan
) -> list[Row]:
    rng = _rng(plan, "stage1")
    rows: list[Row] = []
    for image in _take(train, plan.stage1_shapes, rng):
        name = folder.add_file(image.path, f"shapes/train-{image.number:05d}.png", split="train")
        language = rng.choice(plan.languages)
        caption = shapes.captions(image)[language == "zh"]
        rows.append(_caption_row(f"s1-shape-{image.number:05d}", name, caption, language=language))
    for index in range(plan.stage1_drawings):
        drawing = seen[index % len(seen)]
        scene = scenes.single(drawing, rng)
        name = folder.add(scene.image, f"scenes/s1-{index:05d}.png", split="train")
        language = rng.choice(plan.languages)
        caption = scenes.captions(drawing)[language == "zh"]
        rows.append(_caption_row(f"s1-drawing-{index:05d}", name, caption, language=language))
    rng.shuffle(rows)
    return rows


def _stage2(
    folder: _ImageFolder, train: Sequence[ShapeImage], seen: Sequence[Drawing], plan: DatasetPlan
) -> list[Row]:
    rng = _rng(plan, "stage2")
    rows: list[Row] = []
    for image in _take(train, plan.stage2_shapes, rng):
        name = folder.add_file(image.path, f"shapes/train-{image.number:05d}.png", split="train")
        turns = shapes.one_per_topic(_spoken(shapes.all_turns(image, rng), plan), rng)[:MAX_TURNS]
        rows.append(conversation_row(f"s2-shape-{image.number:05d}", name, turns))
    for index, scene in enumerate(_training_scenes(seen, plan, rng)):
        name = folder.add(scene.image, f"scenes/s2-{index:05d}.png", split="train")
        turns = shapes.one_per_topic(_spoken(scene.turns, plan), rng)[:MAX_TURNS]
        rows.append(conversation_row(f"s2-scene-{index:05d}", name, turns))
    exchanges = [
        Turn(question=question, answer=answer, type="text", language=language)
        for pair in zip(_TEXT_ROWS[::2], _TEXT_ROWS[1::2], strict=True)
        for language, (question, answer) in zip(("en", "zh"), pair, strict=True)
    ]
    for index, turn in enumerate(_spoken(exchanges, plan) * plan.text_repeats):
        rows.append(conversation_row(f"s2-text-{index:03d}", None, [turn]))
    rng.shuffle(rows)
    return rows


def _spoken(turns: Iterable[Turn], plan: DatasetPlan) -> list[Turn]:
    """The turns in the plan's languages."""
    return [turn for turn in turns if turn.language in plan.languages]


def _training_scenes(
    seen: Sequence[Drawing], plan: DatasetPlan, rng: random.Random
) -> Iterable[Scene]:
    for index in range(plan.stage2_singles):
        yield scenes.single(seen[index % len(seen)], rng)
    for left, right in _pairs(seen, plan.stage2_pairs, rng, held_out=False):
        yield scenes.pair(left, right, rng)
    for index in range(plan.stage2_several):
        yield scenes.several(rng.choice(seen), 1 + index % 4, rng)


def _pairs(
    seen: Sequence[Drawing], num: int, rng: random.Random, *, held_out: bool
) -> list[tuple[Drawing, Drawing]]:
    """Draws ordered pairs; one unordered pair in five is kept for the held-out file only."""
    pairs: list[tuple[Drawing, Drawing]] = []
    while len(pairs) < num:
        left, right = rng.sample(list(seen), 2)
        key = "/".join(sorted((left.code_point, right.code_point)))
        if (hashlib.sha256(key.encode()).digest()[0] % 5 == 0) == held_out:
            pairs.append((left, right))
    return pairs


def _without_repeats(
    test: Sequence[ShapeImage], training_pixels: set[str]
) -> tuple[list[ShapeImage], int]:
    """Leaves out published test images whose pixels are in the training files."""
    kept = []
    for image in test:
        with Image.open(image.path) as file:
            if pixel_hash(file) not in training_pixels:
                kept.append(image)
    return kept, len(test) - len(kept)


def _heldout(
    folder: _ImageFolder,
    test: Sequence[ShapeImage],
    seen: Sequence[Drawing],
    unseen: Sequence[Drawing],
    plan: DatasetPlan,
) -> list[Row]:
    rng = _rng(plan, "heldout")
    num = plan.heldout_per_type
    rows: list[Row] = []
    for image, turn in shapes.held_out(test, rng, num_per_type=num, languages=plan.languages):
        name = f"shapes/test-{image.number:05d}.png"
        folder.add_file(image.path, name, split="heldout")
        rows.append(_question_row(f"h-{len(rows):05d}", name, turn))
    for scene, kinds in _heldout_scenes(seen, unseen, num, rng):
        name = f"scenes/h-{len(rows):05d}.png"
        folder.add(scene.image, name, split="heldout")
        for language in plan.languages:
            asked = [t for t in scene.turns if t.type in kinds and t.language == language]
            turn = rng.choice(asked)
            if "kind" in kinds:
                turn = Turn(
                    question=turn.question,
                    answer=turn.answer,
                    type="kind of unseen",
                    language=language,
                )
            rows.append(_question_row(f"h-{len(rows):05d}", name, turn))
    return rows


def _heldout_scenes(
    seen: Sequence[Drawing], unseen: Sequence[Drawing], num: int, rng: random.Random
) -> Iterable[tuple[Scene, set[str]]]:
    """New renderings: names of seen drawings, unseen pairs, counts, kinds of unseen drawings."""
    shown = rng.sample(list(seen), len(seen))
    for index in range(num):
        yield scenes.single(shown[index % len(shown)], rng), {"name"}
    for left, right in _pairs(seen, num, rng, held_out=True):
        yield scenes.pair(left, right, rng), {"position"}
    for index in range(num):
        yield scenes.several(rng.choice(seen), 1 + index % 4, rng), {"count"}
    by_kind = [[d for d in unseen if d.kind == kind] for kind in scenes.KIND_NAMES]
    for index in range(num):
        group = by_kind[index % len(by_kind)]
        yield scenes.single(group[index // len(by_kind) % len(group)], rng), {"kind"}


def _question_row(row_id: str, image: str, turn: Turn) -> Row:
    return {
        "id": row_id,
        "image": image,
        "question": turn.question,
        "answers": [turn.answer],
        "type": turn.type,
        "language": turn.language,
    }


def _write_lines(path: Path, rows: Sequence[Row], *, as_list: bool) -> None:
    """Writes one row per line, as a JSON list or as JSON Lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if as_list else "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")

"""The built files: format, balance, determinism, and nothing held out that was trained on."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quickstart_packages import Packages

from vistune.errors import DataError
from vistune.quickstart import datasets, scenes, shapes
from vistune.quickstart.datasets import DatasetPlan, build_datasets, built_in, pixel_hash

PLAN = DatasetPlan(
    seed=3,
    stage1_shapes=10,
    stage1_drawings=12,
    stage2_shapes=20,
    stage2_singles=15,
    stage2_pairs=10,
    stage2_several=8,
    text_repeats=1,
    heldout_per_type=12,
)


def build(packages: Packages, folder: Path, plan: DatasetPlan = PLAN) -> datasets.BuiltDatasets:
    folder.mkdir()
    return build_datasets(
        folder,
        easy_vqa=packages.easy_vqa,
        drawings=packages.drawings,
        names=packages.names,
        plan=plan,
    )


@pytest.fixture(scope="module")
def built(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> datasets.BuiltDatasets:
    return build(packages, tmp_path_factory.mktemp("data") / "built")


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def test_training_rows_are_llava_conversations(built: datasets.BuiltDatasets) -> None:
    for path in (built.stage1, built.stage2):
        rows = rows_of(path)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            marked = [turn["value"].count("<image>") for turn in turns]
            assert sum(marked) == marked[0] == ("image" in row)
            assert all(turn["value"].strip() for turn in turns)
            if "image" in row:
                with Image.open(built.images / row["image"]) as image:
                    assert image.mode == "RGB"


def test_counts_are_the_plan(built: datasets.BuiltDatasets) -> None:
    stage2 = rows_of(built.stage2)
    text_only = [row for row in stage2 if "image" not in row]
    assert len(rows_of(built.stage1)) == 10 + 12
    assert len(stage2) == 20 + 15 + 10 + 8 + len(text_only)
    assert len(text_only) > 0
    assert built.counts["left_out_unsettled"] == 2
    assert built.counts["heldout_questions"] == len(rows_of(built.heldout))
    assert built_in(built.card.parent) == built


def test_no_held_out_image_has_the_pixels_of_a_training_image(
    built: datasets.BuiltDatasets,
) -> None:
    def pixels(rows: list[dict[str, Any]]) -> set[str]:
        found = set()
        for row in rows:
            if "image" in row:
                with Image.open(built.images / row["image"]) as image:
                    found.add(pixel_hash(image))
        return found

    trained = pixels(rows_of(built.stage1)) | pixels(rows_of(built.stage2))
    held_out = pixels(rows_of(built.heldout))
    assert trained and held_out
    assert not trained & held_out


def test_every_answer_of_a_type_is_equally_common(built: datasets.BuiltDatasets) -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows_of(built.heldout):
        answers[row["type"], row["language"]][row["answers"][0]] += 1
    for kind in ("shape", "colour", "count", "kind of unseen"):
        for language in ("en", "zh"):
            counts = answers[kind, language].values()
            assert len(counts) > 1, kind
            assert max(counts) == min(counts), (kind, language, answers[kind, language])


def test_unseen_drawings_and_held_out_pairs_stay_out_of_training(
    built: datasets.BuiltDatasets,
) -> None:
    unseen = {p for points in scenes.UNSEEN_CODE_POINTS.values() for p in points.split()}
    seen = {p for points in scenes.SEEN_CODE_POINTS.values() for p in points.split()}
    assert not unseen & seen
    trained = built.stage1.read_text("utf-8") + built.stage2.read_text("utf-8")
    assert any(f"thing {point}" in trained for point in seen)
    assert not any(point in trained for point in unseen)


def test_the_seed_decides_every_byte(packages: Packages, tmp_path: Path) -> None:
    first = build(packages, tmp_path / "a")
    again = build(packages, tmp_path / "b")
    other = build(packages, tmp_path / "c", DatasetPlan(**{**vars(PLAN), "seed": 4}))
    for name in ("stage1", "stage2", "heldout"):
        content = getattr(first, name).read_bytes()
        assert content == getattr(again, name).read_bytes()
        assert content != getattr(other, name).read_bytes()
    files = sorted(p.relative_to(first.images) for p in first.images.rglob("*.png"))
    assert files
    for file in files:
        assert (first.images / file).read_bytes() == (again.images / file).read_bytes()


def test_a_plan_larger_than_the_package_is_refused(packages: Packages, tmp_path: Path) -> None:
    plan = DatasetPlan(**{**vars(PLAN), "stage2_shapes": 61})
    with pytest.raises(DataError, match="more images than the package has") as refused:
        build(packages, tmp_path / "large", plan)
    assert (refused.value.got, refused.value.expected) == (61, 60)


def test_a_test_image_that_is_also_in_training_is_left_out(
    packages: Packages, tmp_path: Path
) -> None:
    images, _ = shapes.read_split(packages.easy_vqa, "test")
    with Image.open(images[0].path) as image:
        kept, num_left_out = datasets._without_repeats(images, {pixel_hash(image)})
    assert num_left_out == 1
    assert images[0] not in kept


def test_contradicting_answers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rows = [["what color is the shape?", "red", 0], ["is there a blue shape?", "yes", 0]]
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="contradict"):
        shapes.read_split(tmp_path, "train")


def test_labels_come_from_open_and_from_yes_no_questions(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rows = [
        ["what is the blue shape?", "circle", 0],
        ["is there not a teal shape?", "no", 1],
        ["is a triangle present?", "yes", 1],
        ["is there a red shape?", "no", 2],
    ]
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    images, num_left_out = shapes.read_split(tmp_path, "train")
    assert [(i.colour, i.shape) for i in images] == [("blue", "circle"), ("teal", "triangle")]
    assert num_left_out == 1


def test_scenes_say_what_they_show(packages: Packages) -> None:
    import random

    drawings = scenes.read_drawings(packages.drawings, packages.names)
    rng = random.Random(0)
    scene = scenes.pair(drawings[0], drawings[1], rng)
    answers = {turn.question: turn.answer for turn in scene.turns}
    assert answers["What is on the left?"] == drawings[0].english
    assert answers["右边是什么？"] == drawings[1].chinese
    for num in (1, 4):
        counted = scenes.several(drawings[2], num, rng)
        assert counted.turns[0].answer == scenes.COUNT_NAMES[num][0]
        # A quarter is either plain background or holds one drawing.
        quarters = [
            counted.image.crop((x, y, x + 64, y + 64)).getcolors(64 * 64)
            for x in (0, 64)
            for y in (0, 64)
        ]
        assert sum(len(colours or []) > 1 for colours in quarters) == num


def test_a_drawing_without_a_name_is_an_error(packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no drawing or no name") as refused:
        scenes.read_drawings(packages.drawings, packages.names, {"animal": "1f300"})
    assert refused.value.where == "U+1f300"


def test_a_plan_in_one_language_holds_nothing_of_the_other(
    packages: Packages, tmp_path: Path
) -> None:
    english = build(packages, tmp_path / "en", DatasetPlan(**{**vars(PLAN), "languages": ("en",)}))
    for path in (english.stage1, english.stage2, english.heldout):
        text = path.read_text("utf-8")
        assert text.isascii()
        assert len(rows_of(path)) > 0
    assert {row["language"] for row in rows_of(english.heldout)} == {"en"}

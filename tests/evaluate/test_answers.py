"""Answer comparison: the public processor value by value, and our exact match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistune.evaluate.answers import (
    exact_match,
    normalised,
    vqa_accuracy,
    vqa_answer_scores,
    vqa_processed,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "fixtures/parity/textvqa_answers.json").read_text("utf-8")
)


@pytest.mark.parametrize("case", GOLDEN["processor"], ids=lambda c: c["input"][:20])
def test_processor_equals_the_public_one(case: dict[str, str]) -> None:
    assert vqa_processed(case["input"]) == case["output"]


@pytest.mark.parametrize("case", GOLDEN["accuracy"], ids=lambda c: c["prediction"][:20])
def test_soft_accuracy_equals_the_public_one(case: dict[str, object]) -> None:
    prediction, answers = str(case["prediction"]), case["answers"]
    assert isinstance(answers, list)
    assert [vqa_processed(a) for a in answers] == case["processed_answers"]
    assert vqa_answer_scores(answers) == pytest.approx(case["answer_scores"], abs=1e-12)
    assert vqa_accuracy(prediction, answers) == pytest.approx(case["score"], abs=1e-12)


def test_mean_accuracy_of_the_golden_set() -> None:
    scores = [vqa_accuracy(c["prediction"], c["answers"]) for c in GOLDEN["accuracy"]]
    assert sum(scores) / len(scores) == pytest.approx(GOLDEN["mean_accuracy"], abs=1e-12)


@pytest.mark.parametrize(
    ("written", "processed"),
    [
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the public table
        ("ows'at", "ows'at"),
        ("somebody'd", "somebodyd"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("Ive", "ive"),
    ],
)
def test_contractions(written: str, processed: str) -> None:
    assert vqa_processed(written) == processed


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Red.", "red", 1.0),
        (" a red circle ", "red circle", 1.0),
        ("A", "a", 1.0),
        ("the", "a", 0.0),
        ("红色。", "红色", 1.0),
        ("“红色”！", "红色", 1.0),
        ("３", "3", 1.0),
        ("3.5", "35", 0.0),
        ("7:30.", "7:30", 1.0),
        ("red circle", "red", 0.0),
        ("", "red", 0.0),
        ("two\n dogs", "two dogs", 1.0),
        ("STRASSE", "straße", 1.0),
    ],
)
def test_exact_match(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, ["something else", answer]) == score


@pytest.mark.parametrize("text", ["The  Dog.", "“a”", "…", "ﬁsh", "İ", "a red. "])
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)

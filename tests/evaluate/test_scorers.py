"""Which rule scores what, and the prior."""

from __future__ import annotations

import pytest

from vistune.errors import DataError, RegistryError
from vistune.evaluate.scorers import SCORERS, prior_answers, prior_scores, rule_for
from vistune.evaluate.tasks import Question
from vistune.types import Turn


def question(*answers: str, kind: str = "all", choices: tuple[str, ...] = ()) -> Question:
    return Question("1", "t:1", (Turn("user", ("q",)),), (), answers, kind, None, choices)


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (question("a"), "exact"),
        (question("a", "b", "c"), "exact"),
        (question(*["a"] * 10), "vqa"),
        (question("a", choices=("a", "b")), "choice"),
        (question(*["a"] * 10, choices=("a", "b")), "choice"),
    ],
)
def test_auto_decides_by_the_question(asked: Question, rule: str) -> None:
    assert rule_for(asked, "auto") == rule
    assert SCORERS.get("auto")("a", asked) == SCORERS.get(rule)("a", asked)


def test_scores() -> None:
    ten = question(*["red"] * 3, *["dark red"] * 7)
    assert SCORERS.get("vqa")("Red.", ten) == pytest.approx(0.9)
    assert SCORERS.get("exact")("Red.", ten) == 1.0
    options = question("B b", choices=("A a", "B b"))
    assert SCORERS.get("choice")("B b", options) == 1.0
    assert SCORERS.get("choice")("b b", options) == 0.0


@pytest.mark.parametrize(
    ("asked", "scorer", "part"),
    [(question("a"), "choice", "needs choices"), (question("a"), "vqa", "1 answers")],
)
def test_a_scorer_that_cannot_score(asked: Question, scorer: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        rule_for(asked, scorer)


def test_unknown_scorer() -> None:
    with pytest.raises(RegistryError, match="did you mean 'exact'"):
        rule_for(question("a"), "exatc")


def test_the_prior_is_the_commonest_answer_of_each_type() -> None:
    asked = [
        question("Red.", kind="colour"),
        question("red", kind="colour"),
        question("blue", kind="colour"),
        question("yes", kind="yes/no"),
        question("a", kind="pick", choices=("a", "b", "c", "d")),
        question("a", "b", kind="pick", choices=("a", "b", "c", "d")),
    ]
    assert prior_answers(asked)["colour"] in ("Red.", "red")
    assert prior_scores(asked, "auto") == [1.0, 1.0, 0.0, 1.0, 0.25, 0.5]


def test_the_prior_knows_the_language() -> None:
    def asked(answer: str, language: str) -> Question:
        return Question("1", "t:1", (Turn("user", ("q",)),), (), (answer,), "shape", language)

    both = [asked("circle", "en"), asked("圆", "zh"), asked("square", "en"), asked("圆", "zh")]
    assert prior_answers(both)["shape (zh)"] == "圆"
    assert sum(prior_scores(both, "exact")) == 3.0

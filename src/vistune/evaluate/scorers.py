"""Which rule scores an answer, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from vistune.errors import DataError
from vistune.evaluate.answers import exact_match, normalised, vqa_accuracy
from vistune.evaluate.tasks import Question
from vistune.registry import Registry

Scorer: TypeAlias = Callable[[str, Question], float]
"""Answer and question -> score in [0, 1]."""

SCORERS: Registry[Scorer] = Registry("scorer")
# Fewer can never agree enough for a full score.
_MIN_ANNOTATORS = 4


@SCORERS.register("exact")
def score_exact(answer: str, question: Question) -> float:
    """1 when the normalised answer is one of the normalised gold answers."""
    return exact_match(answer, question.answers)


@SCORERS.register("vqa")
def score_vqa(answer: str, question: Question) -> float:
    """VQA soft accuracy over the annotators' answers."""
    return vqa_accuracy(answer, question.answers)


@SCORERS.register("choice")
def score_choice(answer: str, question: Question) -> float:
    """1 when the option chosen (by log-probability, not by parsing text) is a gold answer."""
    return float(answer in question.answers)


@SCORERS.register("auto")
def score_auto(answer: str, question: Question) -> float:
    """`choice` where there are choices, `vqa` with several annotators, else `exact`."""
    return SCORERS.get(rule_for(question, "auto"))(answer, question)


def rule_for(question: Question, scorer: str) -> str:
    """Returns the rule that scores a question: `exact`, `vqa` or `choice`.

    Args:
        question: The question.
        scorer: Name of a scorer; `auto` decides by the question.

    Raises:
        RegistryError: There is no scorer of that name.
        DataError: The question has not what the scorer needs.
    """
    SCORERS.get(scorer)
    if scorer == "choice" and not question.choices:
        raise DataError(
            "the scorer 'choice' needs choices",
            where=question.where,
            fix='add "choices" to the row, or use --scorer auto',
        )
    if scorer == "vqa" and len(question.answers) < _MIN_ANNOTATORS:
        raise DataError(
            "the scorer 'vqa' compares annotators, and with so few no answer can score in full",
            where=question.where,
            got=f"{len(question.answers)} answers",
            expected=f"at least {_MIN_ANNOTATORS}, usually 10",
            fix="use --scorer exact",
        )
    if scorer != "auto":
        return scorer
    if question.choices:
        return "choice"
    return "vqa" if len(question.answers) >= _MIN_ANNOTATORS else "exact"


def prior_group(question: Question) -> str:
    """Returns what the prior tells questions apart by: their type and, where known, language."""
    return question.type if question.language is None else f"{question.type} ({question.language})"


def prior_answers(questions: Sequence[Question]) -> dict[str, str]:
    """Returns the most common gold answer of each group, as its annotators wrote it most often.

    It is taken from the test set itself, so it bounds from above what answering every question of
    a type and language alike can score.
    """
    by_group: dict[str, Counter[str]] = {}
    written: dict[tuple[str, str], Counter[str]] = {}
    for question in questions:
        group = prior_group(question)
        for answer in question.answers:
            key = normalised(answer)
            by_group.setdefault(group, Counter())[key] += 1
            written.setdefault((group, key), Counter())[answer] += 1
    return {
        group: written[group, counts.most_common(1)[0][0]].most_common(1)[0][0]
        for group, counts in by_group.items()
    }


def prior_scores(questions: Sequence[Question], scorer: str) -> list[float]:
    """Returns what answering from the prior alone scores: no image, no question is read.

    Args:
        questions: The test set.
        scorer: Name of the scorer.

    Returns:
        For each question: chance among its choices where it has choices, else the score of its
        group's most common answer.
    """
    answers = prior_answers(questions)
    scores = []
    for question in questions:
        if rule_for(question, scorer) == "choice":
            gold = set(question.answers) & set(question.choices)
            scores.append(len(gold) / len(question.choices))
        else:
            scores.append(SCORERS.get(scorer)(answers[prior_group(question)], question))
    return scores

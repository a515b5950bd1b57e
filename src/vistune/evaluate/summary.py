"""What an evaluation found, as data: scores by system and type, differences, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from vistune.errors import DataError
from vistune.evaluate.bootstrap import Difference, Estimate, difference, estimate
from vistune.evaluate.tasks import Question
from vistune.recipe import Section

PRIOR = "prior"
"""Name of the control that answers without model."""


class SystemScores(Section):
    """The scores of one system (a model, a model without images, or the prior)."""

    label: str
    """What tables call it."""
    overall: Estimate
    """All questions."""
    by_type: dict[str, Estimate]
    """Question type -> score."""
    by_language: dict[str, Estimate] = {}
    """Language -> score, where the test set names languages."""
    seconds: float | None = None
    """Time to answer all questions, image reading included, model loading left out."""
    num_answer_tokens: int | None = None
    """Tokens in all answers."""

    @property
    def answer_tokens_per_s(self) -> float | None:
        """Answer tokens per second of `seconds`; None where nothing was measured."""
        if not self.seconds or self.num_answer_tokens is None:
            return None
        return self.num_answer_tokens / self.seconds


class SystemDifference(Section):
    """One paired comparison."""

    first: str
    """Name of the system expected to be better."""
    second: str
    """Name of the other."""
    overall: Difference
    """All questions."""
    by_type: dict[str, Difference]
    """Question type -> difference."""


class Summary(Section):
    """One evaluation, whole."""

    format_version: int = 1
    """Version of this file's form."""
    task: str
    """The test set's file."""
    task_sha256: str
    """Digest of that file."""
    scorer: str
    """Scorer asked for."""
    rules: dict[str, int]
    """Rule -> questions scored by it."""
    seed: int
    """Seed of the bootstrap."""
    systems: dict[str, SystemScores]
    """Name -> scores."""
    differences: tuple[SystemDifference, ...]
    """Paired comparisons."""
    prior_answers: dict[str, str]
    """Type (and language) -> the answer the prior gives."""
    versions: dict[str, str] = {}
    """Package versions."""
    device: str = ""
    """Device the models ran on."""

    def difference(self, first: str, second: str) -> SystemDifference | None:
        """Returns the comparison of two systems, or None where it was not made."""
        for found in self.differences:
            if (found.first, found.second) == (first, second):
                return found
        return None

    @property
    def types(self) -> list[str]:
        """Question types in the order of the test set."""
        return list(next(iter(self.systems.values())).by_type)


def read_summary(path: Path) -> Summary:
    """Reads a `summary.json`.

    Raises:
        DataError: It is not there or not one of ours.
    """
    try:
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise DataError(
            "not an evaluation summary", where=str(path), got=str(error).splitlines()[0]
        ) from error


def scores_of(
    questions: Sequence[Question],
    scores: Sequence[float],
    *,
    label: str,
    seed: int,
    seconds: float | None = None,
    num_answer_tokens: int | None = None,
) -> SystemScores:
    """Summarises one system's scores.

    Args:
        questions: The test set.
        scores: One score per question, in [0, 1].
        label: What tables call the system.
        seed: Seed of the bootstrap.
        seconds: Time to answer.
        num_answer_tokens: Tokens in all answers.
    """

    def part(rows: Sequence[int]) -> Estimate:
        return estimate([scores[r] for r in rows], [questions[r].unit for r in rows], seed=seed)

    languages = groups([q.language for q in questions if q.language is not None])
    by_language = groups([q.language or "" for q in questions]) if languages else {}
    return SystemScores(
        label=label,
        overall=part(range(len(questions))),
        by_type={k: part(rows) for k, rows in groups([q.type for q in questions]).items()},
        by_language={k: part(rows) for k, rows in by_language.items() if k},
        seconds=seconds,
        num_answer_tokens=num_answer_tokens,
    )


def compare(
    questions: Sequence[Question],
    scores: Mapping[str, Sequence[float]],
    first: str,
    second: str,
    *,
    seed: int,
) -> SystemDifference:
    """Compares two systems pair by pair, over all questions and by type.

    Args:
        questions: The test set.
        scores: System name -> one score per question.
        first: System expected to be better.
        second: The other.
        seed: Seed of the bootstrap.
    """

    def part(rows: Sequence[int]) -> Difference:
        return difference(
            [scores[first][r] for r in rows],
            [scores[second][r] for r in rows],
            [questions[r].unit for r in rows],
            seed=seed,
        )

    return SystemDifference(
        first=first,
        second=second,
        overall=part(range(len(questions))),
        by_type={k: part(rows) for k, rows in groups([q.type for q in questions]).items()},
    )


def groups(keys: Sequence[str]) -> dict[str, list[int]]:
    """Returns the row numbers of each key, keys in order of first appearance."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return found

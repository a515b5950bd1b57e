"""Asks every system every question, scores the answers and writes them down as they come.

An evaluation that was killed goes on where it stopped; one whose settings differ is not continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vistune.errors import DataError
from vistune.evaluate.scorers import SCORERS, prior_answers, prior_scores, rule_for
from vistune.evaluate.summary import PRIOR, Summary, compare, groups, scores_of
from vistune.evaluate.tasks import Question

SUMMARY_NAME = "summary.json"
RESULTS_NAME = "results.jsonl"
SETTINGS_NAME = "settings.json"
Progress = Callable[[str, int, int], None]
"""Receives the system's name, questions answered and questions in all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one system.

    Args:
        id: The question's id.
        text: What the model said, or the option it chose.
        num_tokens: Tokens of the answer.
        seconds: This question's share of its batch's time.
    """

    id: str
    text: str
    num_tokens: int
    seconds: float


class Answerer(Protocol):
    """Something that answers questions."""

    @property
    def batch_size(self) -> int:
        """Questions it takes at once."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers freely."""

    def choose(self, questions: Sequence[Question]) -> list[Answer]:
        """Chooses one of each question's options."""


@dataclass(frozen=True)
class System:
    """A model to evaluate.

    Args:
        name: Short fixed name ("model", "baseline").
        label: What tables call it.
        identity: What makes it this model and no other (path, step, file times).
        load: Loads it; called only when an answer is missing.
        blind: Ask it without images too.
    """

    name: str
    label: str
    identity: str
    load: Callable[[], Answerer]
    blind: bool = True

    @property
    def blind_name(self) -> str:
        """Name of the same model asked without images."""
        return f"{self.name}_blind"


@dataclass(frozen=True)
class EvaluationPlan:
    """What decides an evaluation's result, apart from models and questions.

    Args:
        task: The test set's file.
        scorer: Name of the scorer.
        seed: Seed of the bootstrap.
        versions: Package versions, recorded.
        device: Device, recorded.
        settings: Further settings that decide answers (longest answer, number format).
    """

    task: Path
    scorer: str = "auto"
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def evaluate(
    questions: Sequence[Question],
    systems: Sequence[System],
    plan: EvaluationPlan,
    *,
    output: Path,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Summary:
    """Evaluates systems on the same questions and compares them.

    Writes into `output`: `answers/<system>.jsonl` while it goes, then `results.jsonl` (one line
    per question, all systems side by side) and `summary.json`.

    Args:
        questions: The test set.
        systems: The models; the first is compared with itself without images, with the prior and
            with each of the others.
        plan: Everything else that decides the result.
        output: Directory of the evaluation.
        overwrite: Discard what another evaluation left there.
        on_progress: Called as answers come.

    Returns:
        The summary, as written.

    Raises:
        DataError: The directory holds an evaluation with other settings.
    """
    rules = [rule_for(question, plan.scorer) for question in questions]
    digest = hashlib.sha256(plan.task.read_bytes()).hexdigest()
    _open_output(output, _settings(questions, systems, plan, digest), overwrite=overwrite)
    answers = _all_answers(questions, systems, rules, output=output, on_progress=on_progress)
    scorer = SCORERS.get(plan.scorer)
    scores = {
        name: [scorer(a.text, q) for a, q in zip(given, questions, strict=True)]
        for name, given in answers.items()
    }
    scores[PRIOR] = prior_scores(questions, plan.scorer)
    _write_results(output / RESULTS_NAME, questions, rules, answers, scores)
    summary = _summarise(questions, systems, plan, rules, answers, scores, digest)
    _write_atomically(output / SUMMARY_NAME, [summary.model_dump_json(indent=2)])
    return summary


def _summarise(
    questions: Sequence[Question],
    systems: Sequence[System],
    plan: EvaluationPlan,
    rules: Sequence[str],
    answers: dict[str, list[Answer]],
    scores: dict[str, list[float]],
    digest: str,
) -> Summary:
    labels = {s.name: s.label for s in systems}
    labels |= {s.blind_name: f"{s.label}, no image" for s in systems}
    labels[PRIOR] = "no model: most common answer"
    summaries = {}
    for name, found in scores.items():
        given = answers.get(name)
        summaries[name] = scores_of(
            questions,
            found,
            label=labels[name],
            seed=plan.seed,
            seconds=None if given is None else sum(a.seconds for a in given),
            num_answer_tokens=None if given is None else sum(a.num_tokens for a in given),
        )
    first = systems[0].name
    others = [systems[0].blind_name, *(s.name for s in systems[1:]), PRIOR]
    pairs = [(first, other) for other in others if other in scores]
    return Summary(
        task=str(plan.task),
        task_sha256=digest,
        scorer=plan.scorer,
        rules={rule: len(rows) for rule, rows in groups(rules).items()},
        seed=plan.seed,
        systems=summaries,
        differences=tuple(compare(questions, scores, a, b, seed=plan.seed) for a, b in pairs),
        prior_answers=prior_answers(questions),
        versions=plan.versions,
        device=plan.device,
    )


def _all_answers(
    questions: Sequence[Question],
    systems: Sequence[System],
    rules: Sequence[str],
    *,
    output: Path,
    on_progress: Progress | None,
) -> dict[str, list[Answer]]:
    answers: dict[str, list[Answer]] = {}
    for system in systems:
        answerer: Answerer | None = None
        arms = [(system.name, list(questions))]
        if system.blind:
            arms.append((system.blind_name, [question.blind() for question in questions]))
        for name, asked in arms:
            file = output / "answers" / f"{name}.jsonl"
            done = _read_answers(file)
            if any(question.id not in done for question in asked):
                answerer = answerer or system.load()
                _ask(answerer, name, asked, rules, done, file=file, on_progress=on_progress)
            answers[name] = [done[question.id] for question in asked]
    return answers


def _ask(
    answerer: Answerer,
    name: str,
    questions: Sequence[Question],
    rules: Sequence[str],
    done: dict[str, Answer],
    *,
    file: Path,
    on_progress: Progress | None,
) -> None:
    """Asks the questions not answered yet; adds to `done` and to the file batch by batch."""
    # Questions of one length together: less padding. Results are in the file's order again later.
    left = [(q, rule) for q, rule in zip(questions, rules, strict=True) if q.id not in done]
    left.sort(key=lambda pair: (pair[1] == "choice", len(pair[0].images), len(pair[0].text)))
    with file.open("a", encoding="utf-8") as out:
        for is_choice in (False, True):
            group = [q for q, rule in left if (rule == "choice") == is_choice]
            for start in range(0, len(group), answerer.batch_size):
                batch = group[start : start + answerer.batch_size]
                given = answerer.choose(batch) if is_choice else answerer.answer(batch)
                for answer in given:
                    done[answer.id] = answer
                    out.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                out.flush()
                if on_progress is not None:
                    on_progress(name, len(done), len(questions))


def _read_answers(file: Path) -> dict[str, Answer]:
    """Reads the answers given so far; a last line cut off by a kill is taken out of the file."""
    if not file.is_file():
        return {}
    lines = file.read_bytes().split(b"\n")
    whole = lines[:-1]
    if lines[-1]:
        _write_atomically(file, [line.decode("utf-8") for line in whole])
    try:
        answers = [Answer(**json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise DataError(
            "the answers of an earlier start cannot be read",
            where=str(file),
            got=error,
            fix="add --overwrite to ask again",
        ) from error
    return {answer.id: answer for answer in answers}


def _settings(
    questions: Sequence[Question],
    systems: Sequence[System],
    plan: EvaluationPlan,
    digest: str,
) -> dict[str, Any]:
    return {
        "task_sha256": digest,
        "num_questions": len(questions),
        "scorer": plan.scorer,
        "systems": {s.name: s.identity for s in systems},
        "settings": plan.settings,
    }


def _open_output(output: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Creates the directory, or finds in it the same evaluation to go on with."""
    file = output / SETTINGS_NAME
    (output / "answers").mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    # An evaluation whose model did not even load left nothing to lose.
    answered = any(part.stat().st_size for part in (output / "answers").glob("*.jsonl"))
    if file.is_file() and answered and not overwrite:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        different = sorted(k for k in wanted if wanted[k] != found.get(k))
        if different:
            raise DataError(
                "this directory holds an evaluation with other settings: " + ", ".join(different),
                where=str(output),
                fix="add --overwrite to discard it, or name another directory with --output",
            )
        return
    if overwrite:
        for stale in (output / "answers").glob("*.jsonl"):
            stale.unlink()
    _write_atomically(file, [json.dumps(wanted, ensure_ascii=False, indent=2)])


def _write_results(
    path: Path,
    questions: Sequence[Question],
    rules: Sequence[str],
    answers: dict[str, list[Answer]],
    scores: dict[str, list[float]],
) -> None:
    def row(index: int) -> str:
        question = questions[index]
        entry = {
            "id": question.id,
            "type": question.type,
            "language": question.language,
            "image": [str(image.path) for image in question.images],
            "question": question.text,
            "gold": list(question.answers),
            "choices": list(question.choices),
            "rule": rules[index],
            "answers": {name: given[index].text for name, given in answers.items()},
            "scores": {name: given[index] for name, given in scores.items()},
        }
        return json.dumps(entry, ensure_ascii=False)

    _write_atomically(path, map(row, range(len(questions))))


def _write_atomically(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    temporary.replace(path)

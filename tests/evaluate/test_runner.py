"""The runner with stand-in models: what is asked, written, resumed and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from vistune.errors import DataError
from vistune.evaluate.runner import Answer, EvaluationPlan, System, evaluate
from vistune.evaluate.summary import read_summary
from vistune.evaluate.tasks import Question, read_questions

COLOURS = ("red", "green", "blue")


class Stub:
    """Answers by a rule, and remembers what it was asked."""

    batch_size = 4

    def __init__(self, rule: Callable[[Question], str], fail_after: int | None = None) -> None:
        self.rule = rule
        self.asked: list[Question] = []
        self.fail_after = fail_after

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += questions
        return [Answer(q.id, self.rule(q), 2, 0.5) for q in questions]

    def choose(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [Answer(q.id, q.choices[0], 1, 0.25) for q in questions]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows: list[dict[str, object]] = []
    for i in range(30):
        name = f"{i}.png"
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        colour = COLOURS[i % 3]
        rows.append(
            {"id": i, "image": name, "question": "Which?", "answers": [colour], "type": "colour"}
        )
    sure = {"image": "0.png", "question": "So?", "answers": ["yes"], "type": "yes/no"}
    rows += [{**sure, "id": i, "choices": ["yes", "no"]} for i in range(30, 40)]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def sees(question: Question) -> str:
    return COLOURS[int(question.id) % 3] + "." if question.images else "red"


def run(task: Path, stub: Stub, *, more: Sequence[System] = (), **settings: object):  # type: ignore[no-untyped-def]
    systems = [System("model", "tuned", "v1", lambda: stub), *more]
    return evaluate(
        read_questions(task),
        systems,
        EvaluationPlan(task=task, settings=dict(settings)),
        output=task.parent / "out",
    )


def test_scores_controls_and_files(task: Path) -> None:
    stub = Stub(sees)
    baseline = Stub(lambda _: "green")
    summary = run(
        task, stub, more=[System("baseline", "untuned", "v0", lambda: baseline, blind=False)]
    )
    means = {name: s.overall.mean for name, s in summary.systems.items()}
    assert means == pytest.approx(
        {"model": 1.0, "model_blind": 0.5, "baseline": 0.5, "prior": (10 + 5) / 40}
    )
    assert summary.systems["model"].by_type["colour"].mean == 1.0
    assert summary.systems["prior"].by_type["yes/no"].mean == 0.5  # chance of two options
    assert summary.rules == {"exact": 30, "choice": 10}
    against_blind = summary.difference("model", "model_blind")
    assert against_blind is not None
    # 20 images gain, one image (0.png, asked 11 times) ties.
    assert (against_blind.overall.num_better, against_blind.overall.num_worse) == (20, 0)
    assert against_blind.overall.is_clear
    assert summary.difference("model", "baseline") is not None
    assert summary.difference("model", "prior") is not None
    assert summary.systems["model"].seconds == pytest.approx(30 * 0.5 + 10 * 0.25)
    assert summary.systems["model"].answer_tokens_per_s == pytest.approx(70 / 17.5)
    assert read_summary(task.parent / "out/summary.json") == summary
    results = [json.loads(x) for x in (task.parent / "out/results.jsonl").read_text().splitlines()]
    assert [r["id"] for r in results] == [str(i) for i in range(40)]
    assert results[1]["answers"] == {"model": "green.", "model_blind": "red", "baseline": "green"}
    assert results[1]["scores"] == {"model": 1.0, "model_blind": 0.0, "baseline": 1.0, "prior": 0.0}
    assert results[1]["image"] == [str(task.parent / "1.png")]


def test_blind_control_gets_no_image_and_the_same_words(task: Path) -> None:
    stub = Stub(sees)
    run(task, stub)
    seen = {q.id: q for q in stub.asked if q.images}
    blind = {q.id: q for q in stub.asked if not q.images}
    assert len(seen) == len(blind) == 40
    assert all(blind[i].turns[0].parts == (seen[i].text,) for i in seen)


def test_a_killed_evaluation_goes_on(task: Path) -> None:
    first = Stub(sees, fail_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(task, first)
    file = task.parent / "out/answers/model.jsonl"
    file.write_text(file.read_text() + '{"id": "9", "text": "cut', encoding="utf-8")
    second = Stub(sees)
    summary = run(task, second)
    assert len(first.asked) + len(second.asked) == 80
    assert not {q.id for q in first.asked} & {q.id for q in second.asked if q.images}
    whole = Stub(sees)
    assert run(task, whole) == summary
    assert whole.asked == []  # nothing is asked twice, and no model is loaded


def test_other_settings_are_not_continued(task: Path) -> None:
    run(task, Stub(sees), longest=8)
    with pytest.raises(DataError, match="other settings: settings"):
        run(task, Stub(sees), longest=9)


def test_overwrite_asks_again(task: Path) -> None:
    run(task, Stub(sees))
    stub = Stub(lambda _: "green")
    summary = evaluate(
        read_questions(task),
        [System("model", "m", "other", lambda: stub)],
        EvaluationPlan(task=task),
        output=task.parent / "out",
        overwrite=True,
    )
    assert summary.systems["model"].by_type["colour"].mean == pytest.approx(1 / 3)
    assert len(stub.asked) == 80


def test_damaged_answers_are_named(task: Path) -> None:
    run(task, Stub(sees))
    file = task.parent / "out/answers/model.jsonl"
    file.write_text("{}\n" + file.read_text(), encoding="utf-8")
    with pytest.raises(DataError, match="earlier start"):
        run(task, Stub(sees))

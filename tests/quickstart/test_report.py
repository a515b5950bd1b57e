"""The report: says what the numbers say, and fetches nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vistune.evaluate.summary import PRIOR, Summary, compare, scores_of
from vistune.evaluate.tasks import Question
from vistune.quickstart.report import (
    Notice,
    ReportData,
    RoleCount,
    StageFacts,
    duration,
    headline,
    write_report,
)
from vistune.types import ImageRef, Turn

NUM = 40


def questions(folder: Path) -> list[Question]:
    found = []
    for i in range(NUM):
        path = folder / f"{i}.png"
        Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
        text = "什么颜色？" if i % 2 else "Which <b>colour</b>?"
        found.append(
            Question(
                id=str(i),
                where=f"t:{i}",
                turns=(Turn("user", (0, "\n", text)),),
                images=(ImageRef(path, path.name),),
                answers=("红色" if i % 2 else "red",),
                type="colour" if i < NUM // 2 else "shape",
                language="zh" if i % 2 else "en",
            )
        )
    return found


def summary_of(asked: list[Question], right: dict[str, int]) -> tuple[Summary, dict[str, Any]]:
    scores = {name: [float(i < num) for i in range(NUM)] for name, num in right.items()}
    systems = {name: scores_of(asked, s, label=name, seed=0) for name, s in scores.items()}
    differences = [
        compare(asked, scores, "model", other, seed=0) for other in right if other != "model"
    ]
    summary = Summary(
        task="t.jsonl",
        task_sha256="ab" * 32,
        scorer="auto",
        rules={"exact": NUM},
        seed=0,
        systems=systems,
        differences=tuple(differences),
        prior_answers={},
    )
    return summary, scores


def data(folder: Path, right: dict[str, int]) -> ReportData:
    asked = questions(folder)
    summary, scores = summary_of(asked, right)
    results = [
        {
            "id": q.id,
            "type": q.type,
            "language": q.language,
            "image": [str(i.path) for i in q.images],
            "question": q.text,
            "gold": list(q.answers),
            "answers": {n: "<script>alert(1)</script>" for n in right if n != PRIOR},
            "scores": {n: s[i] for n, s in scores.items()},
        }
        for i, q in enumerate(asked)
    ]
    metrics = [
        {"step": k, "loss": 3.0 - k / 10, "tokens": 100, "image_tokens": 50, "target_tokens": 10,
         "samples": 4, "tokens_per_s": None if k == 1 else 1000.0 + k}
        for k in range(1, 11)
    ]  # fmt: skip
    stage = StageFacts(
        "Stage 1", "It learns.", metrics, [RoleCount("vision", 3_400_000, 0, "frozen")], 61.0, "r"
    )
    return ReportData(
        summary=summary,
        results=results,
        stages=[stage],
        notices=[Notice("Twemoji", "twemoji==1", "CC-BY-4.0", "by Twitter")],
        versions={"torch": "2.13"},
        device="cpu: x",
        timings=[("train", 3700.0)],
        commands=[("Talk:", 'vistune chat m --image "a.png"')],
        about_questions="Balanced <answers>.",
        remarks=["a stand-in was used"],
    )


CLEAR = {"model": 36, "model_blind": 12, "baseline": 8, PRIOR: 14}


class Links(HTMLParser):
    """Collects whatever a browser would fetch, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]


def test_it_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = write_report(data(tmp_path, CLEAR), tmp_path / "r.html").read_text(encoding="utf-8")
    found = Links()
    found.feed(page)
    assert found.fetched
    assert all(link.startswith("data:image/png;base64,") for link in found.fetched)
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://", page)
    assert "Which &lt;b&gt;colour&lt;/b&gt;?" in page


def test_it_says_what_was_measured(tmp_path: Path) -> None:
    page = write_report(data(tmp_path, CLEAR), tmp_path / "r.html").read_text(encoding="utf-8")
    for part in (
        "The model sees: 90 % right with the image, 30 % without.",
        "+60.0 points",
        "90.0",
        "40 held-out questions",
        "p &lt; 0.0001",
        "3.4 M",
        "1 min 1 s",
        "1 h 1 min",
        "1,006",  # the median of the nine measured rates
        "CC-BY-4.0",
        "a stand-in was used",
        "Balanced &lt;answers&gt;.",
        'lang="zh"',
        'aria-label="right"',
        'aria-label="wrong"',
        "vistune chat m --image &#34;a.png&#34;",
    ):
        assert part in page, part
    # One sample for each of two types in two languages.
    assert page.count('<article class="sample">') == 4


def test_no_clear_gain_is_said(tmp_path: Path) -> None:
    weak = {"model": 20, "model_blind": 19, PRIOR: 22}
    summary, _ = summary_of(questions(tmp_path), weak)
    assert headline(summary).startswith("No clear sign that the model uses the image")
    page = write_report(data(tmp_path, weak), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "not beyond chance" in page


def test_without_a_blind_control_nothing_is_claimed(tmp_path: Path) -> None:
    summary, _ = summary_of(questions(tmp_path), {"model": 20, PRIOR: 22})
    assert headline(summary) == "The model answers 50 % of the held-out questions."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

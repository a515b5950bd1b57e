"""The quick start's report: one HTML file with everything in it, nothing fetched from anywhere.

It shows what was measured and how sure one can be; the samples are chosen by a rule that does not
look at the answers.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from vistune.evaluate.summary import PRIOR, Summary
from vistune.quickstart.charts import loss_curve

TEMPLATE_NAME = "report.html.j2"
_SAMPLES_PER_GROUP = 1
_THUMBNAIL_PX = 224
_SHARP_BELOW_PX = 100


@dataclass(frozen=True)
class RoleCount:
    """Parameters of one role of the model.

    Args:
        role: vision, connector, language or head.
        total: All parameters.
        trained: Those that were trained (adapter weights included).
        how: How they were trained, in words.
    """

    role: str
    total: int
    trained: int
    how: str


@dataclass(frozen=True)
class StageFacts:
    """One training stage.

    Args:
        title: What it is called.
        what: One sentence: what trained on what.
        metrics: The lines of `metrics.jsonl`.
        roles: Parameters by role.
        seconds: Wall time of the stage, start-up included; None when not measured.
        recipe: Name of the recipe.
    """

    title: str
    what: str
    metrics: Sequence[dict[str, Any]]
    roles: Sequence[RoleCount]
    seconds: float | None
    recipe: str


@dataclass(frozen=True)
class Notice:
    """Where a part of the quick start comes from.

    Args:
        name: What it is.
        package: Package and version.
        licence: Its licence, as stated.
        note: What else must be said.
    """

    name: str
    package: str
    licence: str
    note: str


@dataclass(frozen=True)
class ReportData:
    """Everything the report says.

    Args:
        summary: The evaluation: `model` after stage 2, `baseline` after stage 1, blind and prior.
        results: The lines of `results.jsonl`.
        stages: Both training stages.
        notices: Licences and attribution.
        versions: Package versions.
        device: Where it ran.
        timings: What took how long, in seconds, in order.
        commands: What to type next: description and command.
        about_questions: What the held-out questions are, type by type.
        remarks: What a reader must be told, such as a stand-in.
    """

    summary: Summary
    results: Sequence[dict[str, Any]]
    stages: Sequence[StageFacts]
    notices: Sequence[Notice]
    versions: dict[str, str]
    device: str
    timings: Sequence[tuple[str, float]]
    commands: Sequence[tuple[str, str]]
    about_questions: str = ""
    remarks: Sequence[str] = field(default_factory=tuple)


SYSTEMS = (
    ("model", "after stage 2", "with the image"),
    ("baseline", "after stage 1", "connector only"),
    ("model_blind", "stage 2, no image", "the same questions"),
    (PRIOR, "no model", "the commonest answer"),
)
"""Name in the evaluation, label and remark, in the order of the tables."""


def write_report(data: ReportData, path: Path) -> Path:
    """Writes the report.

    Args:
        data: What it says.
        path: The HTML file.

    Returns:
        The path written.
    """
    template = resources.files("vistune.quickstart").joinpath(TEMPLATE_NAME).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        percent=lambda v: f"{100 * v:.1f}",
        width=lambda v: f"{100 * v:.2f}%",
        points=lambda v: f"{100 * v:+.1f}",
        count=_count,
        duration=duration,
        language=lambda text: "zh" if _is_chinese(text) else "en",
        p_value=lambda p: "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}",
    )
    names = [s for s in SYSTEMS if s[0] in data.summary.systems]
    page = environment.from_string(template).render(
        data=data,
        systems=names,
        headline=headline(data.summary),
        gain=data.summary.difference("model", "model_blind"),
        stages=[_stage(stage) for stage in data.stages],
        samples=_samples(data.results, [name for name, _, _ in names if name != PRIOR]),
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def headline(summary: Summary) -> str:
    """Returns the result in one sentence, no stronger than the evidence."""
    gain = summary.difference("model", "model_blind")
    seeing = summary.systems["model"].overall.mean
    if gain is None:
        return f"The model answers {100 * seeing:.0f} % of the held-out questions."
    blind = summary.systems["model_blind"].overall.mean
    if gain.overall.is_clear and gain.overall.mean > 0:
        return (
            f"The model sees: {100 * seeing:.0f} % right with the image,"
            f" {100 * blind:.0f} % without."
        )
    return (
        f"No clear sign that the model uses the image: {100 * seeing:.0f} % right with it,"
        f" {100 * blind:.0f} % without."
    )


def duration(seconds: float) -> str:
    """Returns a time as people say it: 48 s, 3 min 20 s, 1 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _is_chinese(text: object) -> bool:
    return any("\u3400" <= letter <= "\u9fff" for letter in str(text))


def _stage(stage: StageFacts) -> dict[str, Any]:
    """Returns what the template shows of a stage."""
    metrics = stage.metrics
    losses = [float(m["loss"]) for m in metrics]
    rates = sorted(m["tokens_per_s"] for m in metrics if m.get("tokens_per_s") is not None)
    chart = loss_curve([int(m["step"]) for m in metrics], losses, title=f"Loss of {stage.title}")
    return {
        "facts": stage,
        "chart": Markup(chart),
        "num_steps": int(metrics[-1]["step"]) if metrics else 0,
        "tokens": sum(int(m["tokens"]) for m in metrics),
        "image_tokens": sum(int(m["image_tokens"]) for m in metrics),
        "target_tokens": sum(int(m["target_tokens"]) for m in metrics),
        "samples": sum(int(m["samples"]) for m in metrics),
        # The median leaves out the first steps, which also warm up.
        "tokens_per_s": rates[len(rates) // 2] if rates else None,
        "total": sum(role.total for role in stage.roles),
        "trained": sum(role.trained for role in stage.roles),
    }


def _samples(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the first question of every type and language, whatever was answered."""
    taken: dict[tuple[str, str | None], int] = {}
    used_images: set[str] = set()
    samples = []
    for row in results:
        group = (row["type"], row.get("language"))
        image = row["image"][0] if row["image"] else ""
        if taken.get(group, 0) >= _SAMPLES_PER_GROUP or (image and image in used_images):
            continue
        taken[group] = taken.get(group, 0) + 1
        used_images.add(image)
        answers = [
            {"system": name, "text": row["answers"][name], "score": row["scores"][name]}
            for name in names
            if name in row["answers"]
        ]
        picture, is_small = thumbnail(Path(image)) if image else (None, False)
        samples.append({**row, "thumbnail": picture, "is_small": is_small, "shown": answers})
    return samples


def thumbnail(path: Path) -> tuple[str, bool]:
    """Returns an image as a data URI of at most 224 px a side.

    Returns:
        The URI, and whether the image is so small that its pixels should stay sharp.
    """
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return uri, max(image.size) < _SHARP_BELOW_PX


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

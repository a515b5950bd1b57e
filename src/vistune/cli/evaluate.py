"""`vistune eval`: score a model on held-out questions, with controls and intervals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.chat import (
    DeviceName,
    DtypeName,
    LanguageBase,
    Model,
    SatRows,
    Template,
    TowerBase,
    WholeBase,
    origin_of,
)

if TYPE_CHECKING:
    from vistune.evaluate.summary import Summary


_SHORT = {
    "model": "model",
    "model_blind": "no image",
    "baseline": "baseline",
    "prior": "no model",
}


def evaluate(
    model: Model,
    task: Annotated[
        Path, typer.Argument(metavar="DATA", help="Held-out questions: .jsonl or .json.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the image paths; DATA's own when left out.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind/--no-blind", help="Ask everything again without the images.")
    ] = True,
    baseline: Annotated[
        Path | None, typer.Option(help="A second model to compare with (the untuned one).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the results; evaluations/MODEL/DATA if not.")
    ] = None,
    scorer: Annotated[str, typer.Option(help="auto, exact, vqa or choice.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard results with other settings.")
    ] = False,
    template: Template = None,
    vision_tower: TowerBase = None,
    language_model: LanguageBase = None,
    base_model: WholeBase = None,
    sat_qkv: SatRows = None,
) -> None:
    """Score a model on held-out questions, next to the same model without images."""
    from vistune.evaluate.scorers import SCORERS
    from vistune.evaluate.tasks import read_questions

    SCORERS.get(scorer)
    questions = read_questions(task, images=images, limit=limit)

    from vistune.cli.console import progress_bar
    from vistune.evaluate.answerer import GenerationSettings, plan_for, systems_of
    from vistune.evaluate.runner import evaluate as run

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, batch_size=batch_size, device=device, dtype=dtype
    )
    origin = origin_of(template, vision_tower, language_model, base_model, sat_qkv)
    systems = systems_of(model, baseline, settings, blind=blind, origin=origin)
    folder = output or Path("evaluations") / _plain(model) / _plain(task.with_suffix(""))
    with progress_bar() as on_progress:
        summary = run(
            questions,
            systems,
            plan_for(task, settings, scorer=scorer),
            output=folder,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    print_summary(summary)
    print(f"results: {folder}")


def _plain(path: Path) -> str:
    """Returns a path as one folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(path)).strip("-.") or "model"


def print_summary(summary: Summary) -> None:
    """Prints the scores of every system, the same by type, and the paired differences."""
    from vistune.cli.console import print_table

    rows: list[tuple[str, ...]] = []
    for name, scores in summary.systems.items():
        found, rate = scores.overall, scores.answer_tokens_per_s
        speed = "" if rate is None else f"{scores.seconds:.0f} s, {rate:.0f} answer tokens/s"
        interval = f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
        rows.append((_SHORT[name], scores.label, f"{100 * found.mean:.1f}", interval, speed))
    heads: tuple[str, ...] = ("", "what", "score", "95 % interval", "answering")
    num = next(iter(summary.systems.values())).overall.num_questions
    print_table(f"Score of {num} questions, percent", heads, rows, numbers=3)
    if len(summary.types) > 1:
        heads = ("type", "questions", *(_SHORT[name] for name in summary.systems))
        rows = []
        for kind in summary.types:
            found_by = [scores.by_type[kind] for scores in summary.systems.values()]
            means = (f"{100 * found.mean:.1f}" for found in found_by)
            rows.append((kind, str(found_by[0].num_questions), *means))
        print_table("By type", heads, rows, numbers=len(heads) - 1)
    rows = []
    for item in summary.differences:
        gain = item.overall
        rows.append(
            (
                f"{_SHORT[item.first]} - {_SHORT[item.second]}",
                f"{100 * gain.mean:+.1f}",
                f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
                f"{gain.p_value:.2g}",
                "clear" if gain.is_clear else "not beyond chance",
            )
        )
    heads = ("difference", "points", "95 % interval", "p (sign test)", "")
    print_table("Paired differences", heads, rows, numbers=4)

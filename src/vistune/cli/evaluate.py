"""`vistune eval`: score a model on held-out questions, with controls and intervals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.chat import DeviceName, DtypeName, Model

if TYPE_CHECKING:
    from vistune.evaluate.summary import Summary


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
) -> None:
    """Score a model on held-out questions, next to the same model without images."""
    from vistune.evaluate.scorers import SCORERS
    from vistune.evaluate.tasks import read_questions

    SCORERS.get(scorer)
    questions = read_questions(task, images=images, limit=limit)

    from vistune.cli.console import progress_bar
    from vistune.evaluate.answerer import GenerationSettings, model_system, plan_for
    from vistune.evaluate.runner import evaluate as run

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, batch_size=batch_size, device=device, dtype=dtype
    )
    systems = [model_system("model", model, settings, label=str(model), blind=blind)]
    if baseline is not None:
        systems.append(
            model_system("baseline", baseline, settings, label=str(baseline), blind=False)
        )
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
    """Prints scores by type for every system, and the paired differences."""
    from vistune.cli.console import print_table

    names = list(summary.systems)
    heads = ["type", "questions", *(summary.systems[name].label for name in names)]
    rows = []
    for kind in [*summary.types, ""]:
        cells = []
        for name in names:
            scores = summary.systems[name]
            found = scores.by_type[kind] if kind else scores.overall
            cells.append(f"{found.mean:6.1%} [{found.low:.1%}, {found.high:.1%}]")
        count = summary.systems[names[0]]
        num = count.by_type[kind].num_questions if kind else count.overall.num_questions
        rows.append((kind or "all", str(num), *cells))
    print_table("Score, with 95 % interval", heads, rows, numbers=len(heads) - 1)
    rows = []
    for item in summary.differences:
        found_d = item.overall
        label = f"{summary.systems[item.first].label} - {summary.systems[item.second].label}"
        verdict = "clear" if found_d.is_clear else "not beyond chance"
        rows.append(
            (
                label,
                f"{100 * found_d.mean:+.1f}",
                f"[{100 * found_d.low:+.1f}, {100 * found_d.high:+.1f}]",
                f"{found_d.p_value:.2g}",
                verdict,
            )
        )
    heads = ["difference", "points", "95 % interval", "p (sign test)", ""]
    print_table("Paired differences", heads, rows, numbers=4)

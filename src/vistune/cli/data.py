"""`vistune data`: check datasets before a run does, and see what the model will be shown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.data_cache import cache
from vistune.cli.data_convert import convert
from vistune.cli.data_source import FormatOption, ImagesOption, Target, plain_plan, source_of
from vistune.cli.data_view import preview, stats
from vistune.cli.recipe import Overrides

if TYPE_CHECKING:
    from collections import Counter

    from vistune.data.check import CheckReport
    from vistune.data.check_rows import RowsReport
    from vistune.recipe import SourceConfig
    from vistune.types import Rejected

app = typer.Typer(help="Check datasets and look at them before training.", no_args_is_help=True)
app.command()(preview)
app.command()(stats)
app.command()(convert)
app.command()(cache)
_EXAMPLES = 4


@app.command()
def check(
    target: Target,
    overrides: Overrides = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every image instead of reading its header.")
    ] = False,
    quarantine: Annotated[
        Path, typer.Option(help="Where the unusable rows are written, one JSON line each.")
    ] = Path("quarantine.jsonl"),
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="With PATH: processes; as many as there are cores, 8 at most."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Read every row and say which cannot be used and why.

    A recipe's data is checked as its run would: template, tokens and image sizes included. Exit
    code 1 when more rows are unusable than the recipe allows (with PATH: any).
    """
    source = source_of(target, format=format, images=images, overrides=overrides or [])
    if source is not None:
        is_good = _check_source(
            source, deep=deep, workers=workers, quarantine=quarantine, as_json=as_json
        )
    else:
        if workers is not None:
            from vistune.errors import RecipeError

            raise RecipeError(
                "--workers belongs to a dataset; a recipe names its own",
                got=workers,
                fix=f"data.workers={workers}",
            )
        is_good = _check_recipe(
            target, overrides or [], deep=deep, quarantine=quarantine, as_json=as_json
        )
    if not is_good:
        raise typer.Exit(1)


def _check_recipe(
    name: str, overrides: Sequence[str], *, deep: bool, quarantine: Path, as_json: bool
) -> bool:
    from vistune.recipe import load_recipe

    recipe = load_recipe(name, overrides).recipe
    from vistune.assembly import draw
    from vistune.cli.console import progress_bar
    from vistune.data.check import check_sources
    from vistune.plan import settle

    blueprint = draw(recipe)
    encoder = blueprint.encoder
    with progress_bar() as progress:
        report = check_sources(
            recipe.data.train,
            encoder,
            max_tokens=settle(recipe, blueprint).batch.row_tokens,
            overlong=recipe.data.overlong,
            deep=deep,
            workers=recipe.data.workers,
            fresh=True,
            progress=lambda done, total: progress("checking rows", done, total),
        )
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        _print_report(report)
    _put_aside(report.rejected, quarantine, as_json=as_json)
    allowed = recipe.data.max_dropped_frac
    is_good = report.num_ok > 0 and report.rejected_frac <= allowed
    if not as_json:
        share = f"{len(report.rejected)} of {report.total_rows} rows unusable"
        print(f"{share} ({report.rejected_frac:.2%}; data.max_dropped_frac allows {allowed:.2%})")
    return is_good


def _print_report(report: CheckReport) -> None:
    from vistune.cli.console import print_table

    rows: list[Sequence[str]] = [
        (name, str(total), str(accepted.size), str(total - accepted.size))
        for name, total, accepted in zip(
            report.sources, report.num_rows, report.accepted, strict=True
        )
    ]
    print_table("Sources", ("source", "rows", "usable", "unusable"), rows, numbers=3)
    facts = report.to_json()
    spread = facts["tokens_per_row"]
    if spread is not None:
        rows = [
            ("tokens", f"{report.num_tokens:,}"),
            ("image tokens", f"{report.num_image_tokens:,}"),
            ("target tokens", f"{report.num_target_tokens:,}"),
            ("images", f"{report.num_images:,}"),
            ("tokens per row", "  ".join(f"{k} {v:,}" for k, v in spread.items())),
        ]
        print_table("Usable rows", ("", "count"), rows, numbers=1)
    _print_scripts(report.scripts)
    _print_remarks(report.notes, report.note_rows)
    _print_reasons(report.rejected)


def _print_scripts(scripts: Counter[str]) -> None:
    from vistune.cli.console import print_table

    if len(scripts) > 1:
        total = sum(scripts.values())
        rows = [(name, f"{count / total:.1%}") for name, count in scripts.most_common()]
        print_table("Scripts of the text", ("script", "rows"), rows, numbers=1)


def _print_remarks(notes: Counter[str], examples: Mapping[str, Sequence[str]]) -> None:
    from vistune.cli.console import print_table

    if notes:
        rows = [
            (name, str(count), ", ".join(examples.get(name, [])))
            for name, count in notes.most_common()
        ]
        print_table("Remarks on usable rows", ("remark", "times", "first"), rows, numbers=1)


def _print_reasons(rejected: Sequence[Rejected]) -> None:
    from vistune.cli.console import print_table

    if not rejected:
        return
    by_reason: dict[str, list[Rejected]] = {}
    for row in rejected:
        by_reason.setdefault(row.reason, []).append(row)
    rows = []
    for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        ids = [row.id or row.where for row in group[:_EXAMPLES]]
        more = ", ..." if len(group) > _EXAMPLES else ""
        first = group[0]
        rows.append((reason, str(len(group)), ", ".join(ids) + more, first.detail, first.fix))
    print_table("Unusable rows", ("reason", "rows", "which", "the first of them", "fix"), rows)


def _put_aside(rejected: Sequence[Rejected], path: Path, *, as_json: bool) -> None:
    if not rejected:
        return
    with path.open("w", encoding="utf-8") as file:
        for row in rejected:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    if not as_json:
        print(f"unusable rows: {path}")


def _check_source(
    source: SourceConfig, *, deep: bool, workers: int | None, quarantine: Path, as_json: bool
) -> bool:
    """Checks one dataset's form, turns and images; tokens need a model and are not counted."""
    from vistune.cli.console import progress_bar
    from vistune.data.check_rows import check_rows
    from vistune.data.formats import open_source

    reader = open_source(source)
    with progress_bar() as progress:
        report = check_rows(
            reader,
            plain_plan(),
            deep=deep,
            workers=min(8, os.cpu_count() or 1) if workers is None else workers,
            progress=lambda done, total: progress("checking rows", done, total),
        )
    if as_json:
        facts = {"format": source.format, "path": source.path, **report.to_json()}
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _print_rows_report(report, source)
    _put_aside(report.rejected, quarantine, as_json=as_json)
    return report.num_ok > 0 and not report.rejected


def _print_rows_report(report: RowsReport, source: SourceConfig) -> None:
    from vistune.cli.console import print_table

    facts = {
        "rows": report.num_rows,
        "usable": report.num_ok,
        "images": report.num_images,
        "turns": report.num_turns,
    }
    rows = [("format", source.format), *((name, f"{value:,}") for name, value in facts.items())]
    print_table("", ("", "count"), rows, numbers=1)
    _print_scripts(report.scripts)
    _print_remarks(report.notes, report.note_rows)
    _print_reasons(report.rejected)
    print("tokens are counted when a recipe is checked: vistune data check RECIPE")

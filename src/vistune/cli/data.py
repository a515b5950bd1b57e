"""`vistune data`: check datasets before a run does, and see what the model will be shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.data_convert import convert
from vistune.cli.data_view import preview, stats
from vistune.cli.recipe import Overrides

if TYPE_CHECKING:
    from vistune.data.check import CheckReport
    from vistune.types import Rejected

app = typer.Typer(help="Check datasets and look at them before training.", no_args_is_help=True)
app.command()(preview)
app.command()(stats)
app.command()(convert)
_EXAMPLES = 4


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE", help="A recipe, or one dataset file (.json, .jsonl)."
        ),
    ],
    overrides: Overrides = None,
    images: Annotated[
        Path | None, typer.Option(help="With FILE: folder of the images; the file's own if not.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every image instead of reading its header.")
    ] = False,
    quarantine: Annotated[
        Path, typer.Option(help="Where the unusable rows are written, one JSON line each.")
    ] = Path("quarantine.jsonl"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Read every row and say which cannot be used and why.

    A recipe's data is checked as its run would: template, tokens and image sizes included. Exit
    code 1 when more rows are unusable than the recipe allows (with FILE: any).
    """
    if Path(target).suffix in (".json", ".jsonl"):
        from vistune.errors import RecipeError

        if overrides:
            raise RecipeError(
                "key=value needs a recipe", got=overrides[0], fix="name a recipe instead of a file"
            )
        is_good = _check_file(target, images, deep=deep, quarantine=quarantine, as_json=as_json)
    else:
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
    if len(report.scripts) > 1:
        total = sum(report.scripts.values())
        rows = [(name, f"{count / total:.1%}") for name, count in report.scripts.most_common()]
        print_table("Scripts of the text", ("script", "rows"), rows, numbers=1)
    if report.notes:
        rows = [
            (name, str(count), ", ".join(report.note_rows.get(name, [])))
            for name, count in report.notes.most_common()
        ]
        print_table("Remarks on usable rows", ("remark", "times", "first"), rows, numbers=1)
    _print_reasons(report.rejected)


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


def _check_file(
    path: str, images: Path | None, *, deep: bool, quarantine: Path, as_json: bool
) -> bool:
    """Checks one file's form, turns and images; tokens need a model and are not counted."""
    from vistune.data.formats import open_source
    from vistune.data.image import ImagePlan, load, probe
    from vistune.data.rejects import reject
    from vistune.errors import RowError
    from vistune.recipe import ImageConfig, SourceConfig
    from vistune.types import ImageDefaults

    reader = open_source(SourceConfig(path=path, images=None if images is None else str(images)))
    # Only the limit on pixels matters here; what the tower wants is not known.
    plan = ImagePlan.resolve(ImageConfig(), ImageDefaults(224, (0.5,) * 3, (0.5,) * 3))
    rejected: list[Rejected] = []
    facts = {"rows": len(reader), "usable": 0, "images": 0, "turns": 0}
    for row in range(len(reader)):
        row_id = None
        try:
            sample = reader.read(row)
            row_id = sample.id
            for image in sample.images:
                if deep:
                    load(image, plan)
                else:
                    probe(image, plan)
        except RowError as error:
            rejected.append(reject(error, source=reader.name, where=reader.where(row), id=row_id))
            continue
        facts["usable"] += 1
        facts["images"] += len(sample.images)
        facts["turns"] += len(sample.turns)
    _print_file_facts(facts, rejected, as_json=as_json)
    _put_aside(rejected, quarantine, as_json=as_json)
    return facts["usable"] > 0 and not rejected


def _print_file_facts(
    facts: Mapping[str, int], rejected: Sequence[Rejected], *, as_json: bool
) -> None:
    if as_json:
        reasons: dict[str, int] = {}
        for row in rejected:
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
        print(json.dumps({**facts, "by_reason": reasons}, ensure_ascii=False, indent=2))
        return
    from vistune.cli.console import print_table

    print_table("", ("", "count"), [(k, f"{v:,}") for k, v in facts.items()], numbers=1)
    _print_reasons(rejected)
    print("tokens are counted when a recipe is checked: vistune data check RECIPE")

"""`vistune data preview` and `vistune data stats`: see what the model will be shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.data_source import (
    Format,
    FormatOption,
    ImagesOption,
    Target,
    plain_plan,
    source_of,
)
from vistune.cli.recipe import Overrides

if TYPE_CHECKING:
    from vistune.data.encode import Encoder
    from vistune.data.preview import Preview
    from vistune.data.stats import DataStats
    from vistune.recipe import Recipe, SourceConfig


def preview(
    target: Target,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows of each source.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="The first of them, from 0.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--html", help="Write a page with the images instead of printing."
        ),
    ] = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    check: Annotated[
        bool, typer.Option(help="On the page: count all rows for its table and histogram.")
    ] = True,
) -> None:
    """Show rows as the model is shown them, the tokens it must learn marked.

    Without a recipe no tokenizer is known: text is then shown instead of tokens.
    """
    subject = _subject(target, format=format, images=images, overrides=overrides or [])
    if isinstance(subject, tuple):
        found = _of_recipe(*subject, start=start, rows=rows)
    else:
        found = _of_source(subject, start=start, rows=rows)
    previews, refused = [], []
    for item in found:
        if isinstance(item, str):
            refused.append(item)
        else:
            previews.append(item)
    if output is not None:
        from vistune.data.preview_page import to_html

        stats = _stats(subject) if check else None
        page = to_html(previews, title=f"{target}: rows as shown", stats=stats, refused=refused)
        output.write_text(page, encoding="utf-8")
        print(f"written: {output}")
    else:
        for shown in previews:
            _print_preview(shown)
    for reason in refused:
        print(f"not usable: {reason}", file=sys.stderr)
    if not previews:
        raise typer.Exit(1)


def _subject(
    target: str, *, format: Format | None, images: Path | None, overrides: Sequence[str]
) -> tuple[Recipe, Encoder] | SourceConfig:
    """Returns the recipe that a target names, with its encoder, or the dataset."""
    source = source_of(target, format=format, images=images, overrides=overrides)
    if source is not None:
        return source
    from vistune.recipe import load_recipe

    recipe = load_recipe(target, overrides).recipe
    from vistune.assembly import draw  # imports torch: behind every error of the recipe

    return recipe, draw(recipe).encoder


def _row_tokens(recipe: Recipe) -> int:
    """Returns the tokens of a row; without a bound where a plan has yet to settle them."""
    limit = recipe.batch.max_tokens
    return 1 << 30 if limit == "auto" else limit


def _of_recipe(
    recipe: Recipe, encoder: Encoder, *, start: int, rows: int
) -> Iterator[Preview | str]:
    """Yields previews, and messages of rows that cannot be used."""
    from vistune.data.formats import open_source
    from vistune.data.preview import preview_sample
    from vistune.errors import RowError

    for source in recipe.data.train:
        reader = open_source(source)
        for row in range(start, min(start + rows, len(reader))):
            try:
                yield preview_sample(
                    encoder,
                    reader.read(row),
                    max_tokens=_row_tokens(recipe),
                    overlong=recipe.data.overlong,
                )
            except RowError as error:
                yield str(error if error.where else error.at(reader.where(row)))


def _of_source(source: SourceConfig, *, start: int, rows: int) -> Iterator[Preview | str]:
    from vistune.data.formats import open_source
    from vistune.data.preview import preview_text
    from vistune.errors import RowError

    reader, plan = open_source(source), plain_plan()
    for row in range(start, min(start + rows, len(reader))):
        try:
            yield preview_text(reader.read(row), plan)
        except RowError as error:
            yield str(error if error.where else error.at(reader.where(row)))


def _stats(subject: tuple[Recipe, Encoder] | SourceConfig) -> DataStats:
    from vistune.cli.console import progress_bar
    from vistune.data.check import check_sources
    from vistune.data.formats import open_source
    from vistune.data.stats import stats_of_report, stats_of_source

    with progress_bar() as bar:

        def progress(done: int, total: int) -> None:
            bar("counting rows", done, total)

        if not isinstance(subject, tuple):
            return stats_of_source(open_source(subject), plain_plan(), progress=progress)
        recipe, encoder = subject
        report = check_sources(
            recipe.data.train,
            encoder,
            max_tokens=_row_tokens(recipe),
            overlong=recipe.data.overlong,
            workers=recipe.data.workers,
            progress=progress,
        )
        return stats_of_report(report)


def stats(
    target: Target,
    overrides: Overrides = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the histograms into a .png, .svg or .pdf file.")
    ] = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say what a dataset is made of: rows, lengths, images; as tables and as plots.

    With a recipe lengths are tokens; without one, characters.
    """
    subject = _subject(target, format=format, images=images, overrides=overrides or [])
    found = _stats(subject)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        _print_stats(found)
    if plot is not None:
        from vistune.data.plots import plot as draw_plot

        draw_plot(found, plot, title=target)
        print(f"drawn: {plot}", file=sys.stderr if as_json else sys.stdout)
    if not any(part.num_ok for part in found.sources):
        raise typer.Exit(1)


def _print_stats(stats: DataStats) -> None:
    from vistune.cli.console import print_table
    from vistune.data.plots import text_histogram

    rows: list[Sequence[str]] = []
    for source in stats.sources:
        cells = [source.num_rows, source.num_ok, source.num_rows - source.num_ok]
        shown = [f"{cell:,}" for cell in cells]
        more = (source.num_tokens, source.num_image_tokens, source.num_images)
        rows.append((source.name, *shown, *("" if v is None else f"{v:,}" for v in more)))
    names = ("source", "rows", "usable", "unusable", "tokens", "image tokens", "images")
    print_table("Sources", names, rows, numbers=6)
    named = [found for found in stats.distributions if found.values.size]
    if named:
        columns = list(named[0].spread())
        rows = [(d.name, *(f"{v:,.10g}" for v in d.spread().values())) for d in named]
        print_table("Spread", ("", *columns), rows, numbers=len(columns))
    for name, counts in {**stats.counts, "unusable": stats.by_reason}.items():
        if counts:
            rows = [(key, f"{count:,}") for key, count in counts.items()]
            print_table(name.capitalize(), (name, "rows"), rows, numbers=1)
    if named and sys.stdout.isatty():
        print(named[0].name)
        for line in text_histogram(named[0]):
            print(line)


def _print_preview(preview: Preview) -> None:
    """Prints a row; what is learnt is green on a terminal and in brackets in a pipe."""
    from rich.text import Text

    from vistune.cli.console import stdout
    from vistune.data.preview import ImagePiece
    from vistune.data.visible import visible

    is_terminal = sys.stdout.isatty()
    sample = preview.sample
    facts = ""
    if preview.num_tokens:
        facts = (
            f"{preview.num_tokens} tokens, {preview.num_image_tokens} of images,"
            f" {preview.num_targets} learnt"
        )
    shown = Text(f"{visible(sample.id)}  ", style="bold")
    shown.append(f"{visible(sample.where)}  {facts}\n", style="dim not bold")
    was_target = False
    for piece in preview.pieces:
        is_target = not isinstance(piece, ImagePiece) and piece.is_target
        if is_target != was_target and not is_terminal:
            shown.append("⟦" if is_target else "⟧")
        was_target = is_target
        if isinstance(piece, ImagePiece):
            number = f": {piece.num_tokens} tokens" if piece.num_tokens else ""
            shown.append(f"‹image {piece.index + 1}{number}›", style="reverse not bold")
        else:
            style = "green underline" if is_target else "dim"
            shown.append(
                visible(piece.text), style=f"{style} {'bold' if piece.is_special else 'not bold'}"
            )
    if was_target and not is_terminal:
        shown.append("⟧")
    if preview.remarks:
        shown.append("\nremarks: " + ", ".join(preview.remarks), style="yellow not bold")
    stdout().print(shown)
    print()

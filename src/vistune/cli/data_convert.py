"""`vistune data convert`: write a dataset in another format, and say what that would lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistune.cli.data_source import Format, ImagesOption, dataset_of

if TYPE_CHECKING:
    from vistune.data.convert import Conversion


def convert(
    source: Annotated[str, typer.Argument(help="The dataset to read.")],
    output: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[Format, typer.Option("--to", "-t", help="Format to write.")],
    format: Annotated[
        Format | None,
        typer.Option("--from", "-f", help="Format to read; found out when left out."),
    ] = None,
    images: ImagesOption = None,
    images_to: Annotated[
        Path | None,
        typer.Option(help="New folder that images are copied into; else they stay where they are."),
    ] = None,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write what the new format can hold.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older file.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be lost and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a dataset in another format; nothing is written when something would be lost.

    Every row is read back as the new format's reader would, and compared. Formats of one object a
    row are written as .json, .jsonl or .parquet by the name of the output.
    """
    from vistune.cli.console import progress_bar
    from vistune.data.convert import convert as convert_source

    with progress_bar() as progress:
        result = convert_source(
            dataset_of(source, format=format, images=images),
            output,
            to=to.value,
            images_to=images_to,
            allow_loss=allow_loss,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=lambda done, total: progress("converting rows", done, total),
        )
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=False, indent=2))
    else:
        _print(result, output, dry_run=dry_run)


def _print(result: Conversion, output: Path, *, dry_run: bool) -> None:
    from vistune.cli.console import print_table

    if result.losses:
        rows = [
            (kind, str(number), result.examples[kind])
            for kind, number in result.losses.most_common()
        ]
        print_table("Would be lost" if dry_run else "Lost", ("what", "rows", "the first"), rows)
    if dry_run:
        loss = "" if result.losses else "; nothing would be lost"
        print(f"{result.num_written} of {result.num_rows} rows can be written{loss}")
        return
    print(f"{result.num_written} of {result.num_rows} rows written: {output}")
    if result.images is not None:
        print(f"its image names are relative to {result.images} (data.train[].images)")

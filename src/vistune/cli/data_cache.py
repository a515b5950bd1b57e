"""`vistune data cache`: what is kept on disk to start sooner, and how to be rid of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vistune.data.kept import Kept

_MIB = 1 << 20
_DAY_S = 86_400.0


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all that no running process uses.")
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Remove what was unused so long."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what is kept on disk, or remove it.

    All of it can be made again. It bounds itself: what nobody used for 30 days goes, and the
    longest unused beyond 64 GiB, when something new is kept.
    """
    from vistune.data.kept import kept

    entries = kept()
    removed: list[Kept] = []
    if clear or older_than is not None:
        most_s = 0.0 if clear else (older_than or 0.0) * _DAY_S
        now_s = time.time()
        removed = [one for one in entries if now_s - one.used_s >= most_s and one.remove()]
        entries = kept()
    rows = _by_kind(entries)
    freed = sum(one.num_bytes for one in removed)
    if as_json:
        names = ("kind", "number", "in_use", "mib", "unused_days")
        kinds = [dict(zip(names, row, strict=True)) for row in rows]
        print(json.dumps({"kinds": kinds, "removed": len(removed), "freed_mib": freed / _MIB}))
        return
    from vistune.cli.console import print_table
    from vistune.data.cache import cache_folder

    shown = [
        (kind, f"{number:,}", f"{used:,}", f"{mib:,.1f}", f"{days:.1f}")
        for kind, number, used, mib, days in rows
    ]
    columns = ("kept", "number", "in use", "MiB", "longest unused, days")
    print_table(str(cache_folder("index").parent), columns, shown, numbers=4)
    if clear or older_than is not None:
        print(f"{len(removed):,} removed, {freed / _MIB:,.1f} MiB")


def _by_kind(entries: Sequence[Kept]) -> list[tuple[str, int, int, float, float]]:
    """Returns kind, number, how many are in use, MiB, and days since the longest unused was."""
    from vistune.data.kept import KINDS

    now_s, rows = time.time(), []
    for kind in KINDS:
        mine = [one for one in entries if one.kind == kind]
        days = max(((now_s - one.used_s) / _DAY_S for one in mine), default=0.0)
        # Fetched images are many, and read rather than held.
        held = 0 if kind == "images" else sum(one.is_held() for one in mine)
        mib = sum(one.num_bytes for one in mine) / _MIB
        rows.append((kind, len(mine), held, mib, max(0.0, days)))
    return rows

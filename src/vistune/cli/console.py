"""How things look on a terminal: colours there, plain text in a pipe.

Imported only when something is printed: rich costs a tenth of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vistune.errors import VistuneError


@cache
def stdout() -> Console:
    """Returns the console of results; lines are not broken when the output is a pipe or a file."""
    return _console(is_stderr=False)


@cache
def stderr() -> Console:
    """Returns the console of messages and progress."""
    return _console(is_stderr=True)


def _console(*, is_stderr: bool) -> Console:
    stream = sys.stderr if is_stderr else sys.stdout
    width = None if stream.isatty() else 10_000
    return Console(stderr=is_stderr, highlight=False, soft_wrap=not stream.isatty(), width=width)


def print_error(error: VistuneError) -> None:
    """Prints an error a user can mend: a red box on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        print(f"error: {error}", file=sys.stderr)
        return
    text = Text()
    if error.where:
        text.append(f"{error.where}\n", style="dim")
    headline, *details = error.what.splitlines()
    text.append(headline, style="bold")
    text.append("".join(f"\n{line}" for line in details))
    for name in ("got", "expected", "fix"):
        value = {"got": error.got, "expected": error.expected, "fix": error.fix}[name]
        if value is not None:
            text.append(f"\n{name:<9}", style="green" if name == "fix" else "dim")
            text.append(str(value), style="green" if name == "fix" else "")
    stderr().print(Panel(text, title="error", title_align="left", border_style="red", expand=False))


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0
) -> Table:
    """Returns a table whose last columns are right-aligned.

    Args:
        title: Heading, empty for none.
        columns: Column heads.
        rows: Cells.
        numbers: How many of the last columns hold numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len

    made = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    made.min_width = cell_len(title)  # a title wider than its table would be broken in two
    for index, column in enumerate(columns):
        is_number = index >= len(columns) - numbers
        made.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            min_width=None if is_number else 8,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0
) -> None:
    """Prints a table on a terminal, tab-separated lines elsewhere (for cut, sort and awk)."""
    if sys.stdout.isatty():
        stdout().print(table(title, columns, rows, numbers=numbers))
        return
    if title:
        print(f"# {title}")
    for row in (columns, *rows):
        print("\t".join(" ".join(cell.split()) for cell in row))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far something is, on a terminal only.

    Yields:
        What to report to: a name, the number done and the number in all.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    console = stderr()
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield report

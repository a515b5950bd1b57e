"""Tables on a terminal."""

from __future__ import annotations

from rich.console import Console

from vistune.cli.console import table


def test_a_title_wider_than_its_table_stays_on_one_line() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table("Scripts of the text", ("a", "b"), [("x", "1")], numbers=1))
    assert captured.get().splitlines()[0].strip() == "Scripts of the text"

"""`vistune doctor`: what is installed, what this machine offers, and what would go wrong."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Look at versions, device, memory and disk, and say what would go wrong."""
    from vistune.cli.console import print_table
    from vistune.doctor import examine

    findings = examine()
    rows = [(f.state, f.what, f.found, f.fix) for f in findings]
    print_table("", ("", "what", "found", "what to do"), rows)
    num = sum(f.state == "problem" for f in findings)
    print(f"{num} problems" if num != 1 else "1 problem")
    if num:
        raise typer.Exit(1)

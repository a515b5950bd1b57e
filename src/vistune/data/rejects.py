"""Turning a row's error into its quarantine entry."""

from __future__ import annotations

from vistune.errors import RowError
from vistune.types import Rejected


def reject(error: RowError, *, source: str, where: str, id: str | None) -> Rejected:
    """Returns the quarantine entry of a row that raised `error`.

    Args:
        error: Why the row cannot be used.
        source: Name of the data source.
        where: File and row.
        id: The row's id, or None when it could not be read.
    """
    detail = error.what
    if error.where is not None and not error.where.startswith(where):
        detail = f"{error.where}: {detail}"
    if error.got is not None:
        detail += f" (got {error.got}"
        detail += f", expected {error.expected})" if error.expected is not None else ")"
    return Rejected(
        source=source, where=where, id=id, reason=error.reason, detail=detail, fix=error.fix or ""
    )

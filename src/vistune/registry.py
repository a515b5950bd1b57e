"""Registries of named parts: exact names only, and an unknown name lists the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vistune.errors import RegistryError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str | None:
    """Returns the known name closest to `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """A mapping from exact names to parts of one kind.

    Args:
        kind: What the entries are, in the singular, for messages ("data format").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that files its argument under `name`."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            RegistryError: No entry has that name.
        """
        if name in self._entries:
            return self._entries[name]
        known = sorted(self._entries)
        close = nearest(name, known)
        raise RegistryError(
            f"unknown {self.kind} '{name}'" + (f"; did you mean '{close}'?" if close else ""),
            expected=", ".join(known),
        )

    def names(self) -> list[str]:
        """Returns the known names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

"""A table of tensor names: what a public layout calls a weight, and what it is called here.

Written out entry by entry, never by pattern, so that every tensor of a checkpoint is accounted
for in both directions. It renames, reshapes, splits and joins; it never reads a file or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vistune.errors import WeightsError

_MAX_LISTED = 8


@dataclass(frozen=True)
class Form:
    """How one public tensor becomes one or several of ours, and back.

    Args:
        split: Public tensor -> our tensors.
        join: Our tensors -> public tensor.
    """

    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...]], Tensor]


SAME = Form(split=lambda tensor: (tensor,), join=lambda parts: parts[0])
"""One tensor, unchanged."""

WITH_BATCH_AXIS = Form(split=lambda tensor: (tensor[None],), join=lambda parts: parts[0][0])
"""One tensor; ours has one more leading axis of size 1."""


def blocks(count: int) -> Form:
    """Returns the form of `count` equal blocks of rows, such as queries, keys and values."""
    return Form(
        split=lambda tensor: tuple(part.contiguous() for part in tensor.chunk(count, dim=0)),
        join=lambda parts: torch.cat(parts, dim=0),
    )


def interleaved(count: int, *, num_heads: int) -> Form:
    """Returns the form whose rows are grouped by head, each head holding `count` blocks."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        by_head = tensor.reshape(num_heads, count, -1, *tensor.shape[1:])
        return tuple(part.flatten(0, 1).contiguous() for part in by_head.unbind(1))

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        by_head = [part.reshape(num_heads, -1, *part.shape[1:]) for part in parts]
        return torch.stack(by_head, dim=1).flatten(0, 2)

    return Form(split=split, join=join)


@dataclass(frozen=True)
class Entry:
    """One public tensor.

    Args:
        public: Its name in the public layout.
        own: Its name or names in our model.
        form: How they relate.
    """

    public: str
    own: tuple[str, ...]
    form: Form = SAME


@dataclass(frozen=True)
class Unread:
    """A public tensor that carries no weight of the model.

    Args:
        reason: Why it is not read, for messages and documentation.
        make: Builds it for writing; None where it is not written.
    """

    reason: str
    make: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class KeyMap:
    """The names of one public layout.

    Args:
        layout: Its name, for messages.
        entries: One per public tensor that is a weight.
        unread: Public tensors that are not read, by name. They may be missing.
    """

    layout: str
    entries: tuple[Entry, ...]
    unread: Mapping[str, Unread] = field(default_factory=dict)

    def from_public(self, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """Renames a public checkpoint's tensors to ours.

        Args:
            tensors: By public name.
            where: File or directory, for messages.

        Raises:
            WeightsError: A tensor is missing or left over; they are listed. Or one does not split.
        """
        self.check({entry.public for entry in self.entries}, set(tensors), where=where)
        own: dict[str, Tensor] = {}
        for entry in self.entries:
            tensor = tensors[entry.public]
            try:
                parts = entry.form.split(tensor)
                own.update(zip(entry.own, parts, strict=True))
            except (RuntimeError, ValueError, IndexError) as error:
                raise WeightsError(
                    "a tensor has a shape that does not split into its parts",
                    where=where,
                    got=f"{entry.public} {tuple(tensor.shape)}",
                    expected=f"rows of {', '.join(entry.own)}",
                    fix="use the config.json that belongs to these weights",
                ) from error
        return own

    def public_names(self) -> dict[str, str]:
        """Returns the public name behind each of ours, for messages."""
        return {name: entry.public for entry in self.entries for name in entry.own}

    def to_public(self, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """Renames our tensors to the public layout's, with what it carries besides.

        Args:
            tensors: By our names.
            where: What is written, for messages.

        Raises:
            WeightsError: A tensor is missing or left over; they are listed.
        """
        own_names = {name for entry in self.entries for name in entry.own}
        self.check(own_names, set(tensors), where=where)
        public = {
            entry.public: entry.form.join(tuple(tensors[name] for name in entry.own))
            for entry in self.entries
        }
        for name, unread in self.unread.items():
            if unread.make is not None:
                public[name] = unread.make()
        return public

    def check(self, expected: set[str], found: set[str], *, where: str) -> None:
        """Proves that every name is accounted for.

        Raises:
            WeightsError: A name is missing or left over.
        """
        missing, extra = sorted(expected - found), sorted(found - expected - set(self.unread))
        if missing or extra:
            raise WeightsError(
                f"the weights do not fit the {self.layout} layout: {len(missing)} tensors are "
                f"missing and {len(extra)} are left over",
                where=where,
                got=f"left over: {_listed(extra)}" if extra else None,
                expected=f"missing: {_listed(missing)}" if missing else None,
            )


def pairs(
    public: str, own: str, names: Iterable[tuple[str, str]], *, kinds: Iterable[str]
) -> list[Entry]:
    """Returns the entries of modules that only differ in their names.

    Args:
        public: Prefix of the public names, with its dot.
        own: Prefix of ours.
        names: (public module, our module) under those prefixes.
        kinds: Tensors of each module ("weight", "bias").
    """
    kinds = tuple(kinds)
    return [
        Entry(f"{public}{theirs}.{kind}", (f"{own}{ours}.{kind}",))
        for theirs, ours in names
        for kind in kinds
    ]


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")

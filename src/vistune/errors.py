"""Every error a user can cause, as one tree.

Each one says what went wrong, where (file:line, key path, sample id), what was found against what
was expected, and the command or key that fixes it. `assert` is for our own invariants only.
"""

from __future__ import annotations

from typing import Any


class VistuneError(Exception):
    """Base of all errors a user can cause.

    Args:
        what: One sentence: what is wrong, with numbers.
        where: File and line, key path, or sample id.
        got: What was found.
        expected: What would have been right.
        fix: The command or key that mends it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.got is not None:
            lines.append(f"  got:      {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.fix is not None:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling that worker processes use.
        state = {"where": self.where, "got": self.got, "expected": self.expected, "fix": self.fix}
        return (_rebuild, (type(self), self.what, state))


def _rebuild(cls: type[VistuneError], what: str, state: dict[str, object]) -> VistuneError:
    return cls(what, **state)  # type: ignore[arg-type]


class RecipeError(VistuneError):
    """A recipe that cannot be read, or whose values do not fit together."""


class RegistryError(VistuneError):
    """A name that no registry entry carries."""


class DataError(VistuneError):
    """A dataset file or row that cannot be used."""


class RowError(DataError):
    """One dataset row that cannot be used; the others can.

    Args:
        what: One sentence: what is wrong, with numbers.
        reason: A short fixed name to count by ("empty_answer", "image_missing", ...).
        where: File and row.
        got: What was found.
        expected: What would have been right.
        fix: What would make the row usable.
    """

    def __init__(
        self,
        what: str,
        *,
        reason: str,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, where=where, got=got, expected=expected, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        reduced: Any = super().__reduce__()
        rebuild, (cls, what, state) = reduced
        return (rebuild, (cls, what, {**state, "reason": self.reason}))

    def at(self, where: str) -> RowError:
        """Returns the same error said of another place (an image's error, of its row)."""
        cls = type(self)
        return cls(
            self.what if self.where is None else f"{self.where}: {self.what}",
            reason=self.reason,
            where=where,
            got=self.got,
            expected=self.expected,
            fix=self.fix,
        )


class ImageError(RowError):
    """An image that cannot be read or must not be."""


class TemplateError(DataError):
    """A chat template that cannot render a conversation."""


class ModelError(VistuneError):
    """A model that cannot be composed from the parts named."""


class WeightsError(ModelError):
    """Weights that are missing, unexpected or of another shape."""


class CheckpointError(VistuneError):
    """A checkpoint or run directory that cannot be read or written."""


class TrainingError(VistuneError):
    """Training that has to stop."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm that is NaN or infinite."""


class DeviceError(VistuneError):
    """A device or number format that is not there."""


class AssetError(VistuneError):
    """A download that failed, or a file whose checksum is not the one expected."""


class MissingExtraError(VistuneError):
    """A feature whose optional package is not installed."""

    @classmethod
    def of(cls, package: str, *, extra: str, purpose: str) -> MissingExtraError:
        """Builds the message for a missing optional package.

        Args:
            package: The import name that failed.
            extra: The extra of vistune that installs it.
            purpose: What it is needed for.
        """
        return cls(
            f"{purpose} needs the package '{package}', which is not installed",
            fix=f"pip install 'vistune[{extra}]'",
        )

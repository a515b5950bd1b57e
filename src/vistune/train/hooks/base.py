"""The contract of a hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vistune.train.record import StepRecord


class Hook:
    """Looks at a run; every method may be left as it is, which does nothing."""

    def on_start(self, step: int) -> None:
        """Called before the first step of this process, with the steps done before it."""

    def on_record(self, record: StepRecord) -> None:
        """Called at each logged step, before `on_step`."""

    def on_step(self, step: int, *, last: bool) -> None:
        """Called after every optimizer step.

        Args:
            step: Steps done.
            last: Whether the run ends here.
        """

    def close(self) -> None:
        """Called once, also when the run fails."""

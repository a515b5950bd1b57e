"""What a person watching sees: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vistune.train.hooks.base import Hook
from vistune.train.record import StepRecord

_SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    """A bar with a line of numbers under it: beside it, they would push out the step and the time.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.status = ""
        super().__init__(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bar, then the numbers."""
        yield from super().get_renderables()
        yield Text(self.status)


class ConsoleHook(Hook):
    """Shows loss, learning rate, speed, time left and the share of time spent on waiting for data.

    Args:
        console: Where to.
        total_steps: Optimizer steps of the run.
        live: Whether a live bar is wanted; it is shown on a terminal only.
    """

    def __init__(self, console: Console, *, total_steps: int, live: bool) -> None:
        self._console = console
        self._total_steps = total_steps
        self._bar: _Bar | None = None
        self._last_line_s = 0.0
        self._started_s = time.monotonic()
        self._first_step = 0
        self._last_record: StepRecord | None = None
        if live and console.is_terminal:
            self._bar = _Bar(console)

    def on_start(self, step: int) -> None:
        """Starts the bar at the steps already done."""
        self._first_step = step
        self._started_s = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=self._total_steps, completed=step)
            self._bar.start()

    def on_record(self, record: StepRecord) -> None:
        """Shows the record: in the bar, or as a line unless one was printed just now."""
        self._last_record = record
        if self._bar is not None:
            self._bar.status = describe(record)
            return
        now = time.monotonic()
        if record.step == 1 or now - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._print(record)

    def on_step(self, step: int, *, last: bool) -> None:
        """Moves the bar; the last step is always printed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif last and self._last_record is not None and self._last_record.step == step:
            self._print(self._last_record)
            self._last_record = None

    def _print(self, record: StepRecord) -> None:
        done = record.step - self._first_step
        left_s = (time.monotonic() - self._started_s) / done * (self._total_steps - record.step)
        width = len(str(self._total_steps))
        self._last_line_s = time.monotonic()
        self._last_record = None
        self._console.print(
            f"step {record.step:>{width}}/{self._total_steps}  {describe(record)}"
            f"  left {left_s / 60:.1f} min",
            soft_wrap=True,
            highlight=False,
        )

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


def describe(record: StepRecord) -> str:
    """Returns a record in one short line."""
    rates = sorted(set(record.lr.values()), reverse=True)
    parts = [f"loss {record.loss:.4f}", "lr " + "/".join(f"{rate:.2e}" for rate in rates)]
    if record.tokens_per_s is not None:
        parts.append(f"{record.tokens_per_s:,.0f} tokens/s")
    if record.useful_tflops is not None and record.useful_tflops >= 1:
        parts.append(f"{record.useful_tflops:,.0f} TFLOP/s")
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.0%}")
    if record.data_wait_frac is not None:
        parts.append(f"data wait {record.data_wait_frac:.0%}")
    if record.peak_memory_gib is not None:
        parts.append(f"{record.peak_memory_gib:.1f} GiB")
    if record.skipped_steps:
        parts.append(f"skipped {record.skipped_steps}")
    if record.rejected_rows:
        parts.append(f"rejected {record.rejected_rows}")
    return "  ".join(parts)

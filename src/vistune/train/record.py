"""What is measured at a logged step, and the clock that measures it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from vistune.device import Device
from vistune.train.state import Progress
from vistune.train.step import StepSums


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`. A number that was not measured is None.

    Counts, loss and norm are those of this step alone; rates and times are means over the steps
    since the line before (or since the start of the process).

    Args:
        step: Optimizer updates done, this one included.
        epoch: Samples seen over samples of an epoch.
        loss: Mean negative log-likelihood per target token, nats.
        loss_per_source: The same for each data source with targets in this step.
        lr: Learning rate of this update by role.
        grad_norm: Global gradient norm before clipping.
        target_tokens: Tokens learnt from.
        tokens: Tokens, image tokens included; there is no padding to count.
        image_tokens: Tokens that stand for images.
        samples: Samples.
        tokens_per_s: `tokens` per second of wall time, vision tower and data wait included.
        samples_per_s: Samples per second.
        step_s: Wall time of a step.
        data_wait_s: Of that, waiting for data.
        data_wait_frac: `data_wait_s` over `step_s`.
        peak_memory_gib: Most device memory held by tensors since the start; None on a CPU.
        skipped_steps: Steps skipped so far because loss or norm was not finite.
        rejected_rows: Rows that could not be read so far while training.
    """

    step: int
    epoch: float
    loss: float
    loss_per_source: dict[str, float]
    lr: dict[str, float]
    grad_norm: float
    target_tokens: int
    tokens: int
    image_tokens: int
    samples: int
    tokens_per_s: float | None
    samples_per_s: float | None
    step_s: float | None
    data_wait_s: float | None
    data_wait_frac: float | None
    peak_memory_gib: float | None
    skipped_steps: int
    rejected_rows: int

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return asdict(self)


class Clock:
    """Adds up wall time, waiting time and work between two logged steps."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = self._tokens = self._samples = 0
        self.wait_s = 0.0

    def add(self, sums: StepSums) -> None:
        """Counts the work of one step."""
        self._steps += 1
        self._tokens += sums.num_tokens
        self._samples += sums.num_samples

    def pause(self, seconds: float) -> None:
        """Leaves time out that was not spent on steps (checkpoints, sample answers)."""
        self._since += seconds

    def record(
        self,
        sums: StepSums,
        progress: Progress,
        *,
        lr: dict[str, float],
        device: Device,
        samples_per_epoch: int,
    ) -> StepRecord:
        """Returns the record of the step just done and starts the next interval."""
        elapsed_s = time.perf_counter() - self._since
        steps, measured = max(1, self._steps), elapsed_s > 0
        record = StepRecord(
            step=progress.step,
            epoch=progress.num_samples / max(1, samples_per_epoch),
            loss=sums.loss,
            loss_per_source=sums.loss_per_source,
            lr=lr,
            grad_norm=sums.grad_norm,
            target_tokens=sums.num_targets,
            tokens=sums.num_tokens,
            image_tokens=sums.num_image_tokens,
            samples=sums.num_samples,
            tokens_per_s=self._tokens / elapsed_s if measured else None,
            samples_per_s=self._samples / elapsed_s if measured else None,
            step_s=elapsed_s / steps,
            data_wait_s=self.wait_s / steps,
            data_wait_frac=min(1.0, self.wait_s / elapsed_s) if measured else None,
            peak_memory_gib=device.peak_memory_gib(),
            skipped_steps=progress.skipped_steps,
            rejected_rows=len(progress.rejected),
        )
        self._reset()
        return record

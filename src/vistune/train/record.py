"""What is measured at a logged step, and the clock that measures it.

tokens_per_s   = tokens of samples / wall time (data wait, tower, optimizer included)
useful_tflops  = operations needed (models.flops) / wall time / 1e12
mfu            = useful_tflops / matrix products this device was measured to do a second
data_wait_frac = wall time in which the next rows were not there yet / wall time
padding_frac   = tokens computed that belong to no sample / tokens computed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vistune.device import Device
from vistune.train.state import Progress
from vistune.train.step import StepSums
from vistune.types import Batch


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
        target_tokens_per_source: `target_tokens` by data source.
        tokens_per_source: `tokens` by data source.
        samples_per_source: `samples` by data source.
        lr: Learning rate of this update by role.
        grad_norm: Global gradient norm before clipping.
        target_tokens: Tokens learnt from.
        tokens: Tokens, image tokens included, padding excluded.
        image_tokens: Tokens that stand for images.
        samples: Samples.
        tokens_per_s: `tokens` per second of wall time, vision tower and data wait included.
        samples_per_s: Samples per second.
        tflop: Operations a step needed, forward and backward, in TFLOP: the tower's included, no
            gradient of a frozen weight, nothing recomputed; None where the model's cost is not
            known.
        useful_tflops: Operations the rows needed, forward and backward, nothing recomputed, in
            TFLOP/s on this process's device; None where the model's cost is not known.
        mfu: `useful_tflops` over the matrix products measured on this device at the start, a CPU
            included; None where that was not measured.
        padding_frac: Tokens computed that belong to no sample, over tokens computed.
        step_s: Wall time of a step.
        data_wait_s: Of that, waiting for data.
        data_wait_frac: `data_wait_s` over `step_s`.
        peak_memory_gib: Most device memory held by tensors since the start; on a CPU the most
            memory of the process; None where not measured.
        skipped_steps: Steps skipped so far because loss or norm was not finite.
        rejected_rows: Rows that could not be read so far while training.
    """

    step: int
    epoch: float
    loss: float
    loss_per_source: dict[str, float]
    target_tokens_per_source: dict[str, int]
    tokens_per_source: dict[str, int]
    samples_per_source: dict[str, int]
    lr: dict[str, float]
    grad_norm: float
    target_tokens: int
    tokens: int
    image_tokens: int
    samples: int
    tokens_per_s: float | None
    samples_per_s: float | None
    tflop: float | None
    useful_tflops: float | None
    mfu: float | None
    padding_frac: float | None
    step_s: float | None
    data_wait_s: float | None
    data_wait_frac: float | None
    peak_memory_gib: float | None
    skipped_steps: int
    rejected_rows: int

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SourceTotals:
    """What one data source gave in some steps, over all processes.

    Args:
        samples: Samples.
        tokens: Their tokens, image tokens included.
        target_tokens: Tokens learnt from.
        nll: Summed negative log-likelihood of these, nats.
    """

    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    nll: float = 0.0

    def __add__(self, other: SourceTotals) -> SourceTotals:
        return SourceTotals(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.target_tokens + other.target_tokens,
            self.nll + other.nll,
        )

    @property
    def loss(self) -> float | None:
        """Mean negative log-likelihood per target token, nats; None without targets."""
        return self.nll / self.target_tokens if self.target_tokens else None


@dataclass(frozen=True)
class Totals:
    """What was done in some wall time.

    Args:
        seconds: Wall time.
        wait_s: Of that, waiting for data.
        steps: Optimizer steps.
        tokens: Tokens of samples, over all processes.
        samples: Samples, over all processes.
        flops: Operations needed on this process; None where the model's cost is not known.
        computed_tokens: Tokens computed on this process.
        padding_tokens: Of these, those of no sample.
        sources: What every data source gave.
    """

    seconds: float = 0.0
    wait_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    samples: int = 0
    flops: int | None = 0
    computed_tokens: int = 0
    padding_tokens: int = 0
    sources: dict[str, SourceTotals] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Totals(
            self.seconds + other.seconds,
            self.wait_s + other.wait_s,
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.samples + other.samples,
            flops,
            self.computed_tokens + other.computed_tokens,
            self.padding_tokens + other.padding_tokens,
            {
                name: self.sources.get(name, SourceTotals())
                + other.sources.get(name, SourceTotals())
                for name in dict.fromkeys([*self.sources, *other.sources])
            },
        )

    def per_s(self, amount: float) -> float | None:
        """Returns an amount per second, None where no time passed."""
        return amount / self.seconds if self.seconds > 0 else None

    @property
    def useful_tflops(self) -> float | None:
        """Operations needed per second, in TFLOP/s."""
        return None if self.flops is None or not self.flops else self.per_s(self.flops / 1e12)

    def mfu(self, peak_tflops: float | None) -> float | None:
        """Returns the share of a measured peak that was useful."""
        useful = self.useful_tflops
        return None if useful is None or peak_tflops is None else useful / peak_tflops

    @property
    def padding_frac(self) -> float | None:
        """Share of computed tokens that belong to no sample."""
        return self.padding_tokens / self.computed_tokens if self.computed_tokens else None

    @property
    def data_wait_frac(self) -> float | None:
        """Share of the time spent on waiting for data."""
        return min(1.0, self.wait_s / self.seconds) if self.seconds > 0 else None


class Clock:
    """Adds up wall time, waiting time and work between two logged steps.

    Args:
        cost: Counts the operations of a row; None where they are not known.
        peak_tflops: Matrix products measured on the device, TFLOP/s; None where they were not.
        pad_tokens: Length every row is padded to, or None.
    """

    def __init__(
        self,
        cost: Callable[[Batch], int] | None = None,
        *,
        peak_tflops: float | None = None,
        pad_tokens: int | None = None,
    ) -> None:
        self._cost = cost
        self._pad_tokens = pad_tokens or 0
        self.peak_tflops = peak_tflops
        self.done = Totals()
        """All intervals that were recorded."""
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._work = Totals(flops=None if self._cost is None else 0)
        self.wait_s = 0.0

    def add(self, sums: StepSums, rows: Sequence[Batch]) -> None:
        """Counts the work of one step: its sums over all processes, and its rows on this one."""
        computed = sum(max(row.num_tokens, self._pad_tokens) for row in rows)
        used = sum(int(row.cu_seqlens[-1]) for row in rows if row.num_samples)
        self._work += Totals(
            steps=1,
            tokens=sums.num_tokens,
            samples=sums.num_samples,
            flops=None if self._cost is None else sum(self._cost(row) for row in rows),
            computed_tokens=computed,
            padding_tokens=computed - used,
            sources={
                name: SourceTotals(
                    sums.samples_per_source[name],
                    sums.tokens_per_source[name],
                    sums.targets_per_source[name],
                    nll,
                )
                for name, nll in sums.nll_per_source.items()
            },
        )

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
        work = replace(self._work, seconds=elapsed_s, wait_s=self.wait_s)
        steps = max(1, work.steps)
        record = StepRecord(
            step=progress.step,
            epoch=progress.num_samples / max(1, samples_per_epoch),
            loss=sums.loss,
            loss_per_source=sums.loss_per_source,
            target_tokens_per_source=sums.targets_per_source,
            tokens_per_source=sums.tokens_per_source,
            samples_per_source=sums.samples_per_source,
            lr=lr,
            grad_norm=sums.grad_norm,
            target_tokens=sums.num_targets,
            tokens=sums.num_tokens,
            image_tokens=sums.num_image_tokens,
            samples=sums.num_samples,
            tokens_per_s=work.per_s(work.tokens),
            samples_per_s=work.per_s(work.samples),
            tflop=None if work.flops is None else work.flops / steps / 1e12,
            useful_tflops=work.useful_tflops,
            mfu=work.mfu(self.peak_tflops),
            padding_frac=work.padding_frac,
            step_s=elapsed_s / steps,
            data_wait_s=work.wait_s / steps,
            data_wait_frac=work.data_wait_frac,
            peak_memory_gib=device.peak_memory_gib(),
            skipped_steps=progress.skipped_steps,
            rejected_rows=len(progress.rejected),
        )
        self.done = work if self.done.steps == 0 else self.done + work
        self._reset()
        return record

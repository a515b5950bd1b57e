"""The steps of a run, over whatever model and data it is given, from wherever it stands.

It knows neither files formats nor model families: it is handed a model, its groups of trained
parameters and a source of packed rows. `loop.train` says where these come from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import nn

from vistune.checkpoint.files import sync, write_errors_explained
from vistune.checkpoint.manifest import Manifest
from vistune.checkpoint.save import CheckpointContent, save_checkpoint
from vistune.device import Device
from vistune.errors import CheckpointError, DataError
from vistune.parallel import SingleProcess, Strategy
from vistune.recipe import Recipe, sizes
from vistune.train import collector_paused
from vistune.train.failures import nonfinite_error, out_of_memory_explained, step_fix
from vistune.train.hooks import Hook
from vistune.train.interrupt import StopRequest
from vistune.train.opening import OpenRun
from vistune.train.optim import ParameterGroup, build_optimizer, peak_lrs
from vistune.train.record import Clock, StepRecord, Totals
from vistune.train.schedule import Schedule
from vistune.train.state import random_state, set_random_state
from vistune.train.step import LossModule, StepSums, backward_step
from vistune.types import Batch


class StepSource(Protocol):
    """Where rows come from (see `data.loader.TrainData`)."""

    @property
    def num_samples(self) -> int:
        """Usable samples, each counted once."""
        ...

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Returns the optimizer steps of an epoch."""
        ...

    def samples_per_epoch(self, epoch: int = 0) -> int:
        """Returns the samples of an epoch, repeats of a source included."""
        ...

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields the rows of each step without end, from step `start_step` (from 0) on."""
        ...

    def close(self) -> None:
        """Ends worker processes."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run_dir: The run directory.
        checkpoint: The newest checkpoint.
        steps: Optimizer steps done.
        total_steps: Optimizer steps the recipe asks for.
        first_loss: Loss of the first step of this process; None if it did none.
        final_loss: Loss of the last step of this process; None if it did none.
        seconds: Wall time of the steps of this process.
        skipped_steps: Steps skipped because loss or norm was not finite.
        rejected_rows: Rows that could not be read while training.
        interrupted_by: Name of the signal that ended it early, or None.
        totals: Work and wall time of this process's logged steps.
        peak_tflops: Matrix products measured on the device, TFLOP/s, or None.
        peak_memory_gib: Most device memory held by tensors (on a CPU the process's), or None where
            not measured.
    """

    run_dir: Path
    checkpoint: Path
    steps: int
    total_steps: int
    first_loss: float | None
    final_loss: float | None
    seconds: float
    skipped_steps: int
    rejected_rows: int
    interrupted_by: str | None = None
    totals: Totals = field(default_factory=Totals)
    peak_tflops: float | None = None
    peak_memory_gib: float | None = None


@dataclass
class Job:
    """Everything the steps need.

    Args:
        recipe: The recipe.
        opened: The run directory and where the run stands.
        device: Where to compute.
        model: The model, its weights in place, on the device.
        groups: Its trained parameters.
        vocabulary_size: Width of the logits, about: it sizes the chunks they are made in.
        sources: Names of the data sources.
        data: The rows.
        data_fingerprint: Digest of which rows there are; another one is not resumed with.
        manifest: Describes the checkpoint after a step.
        inherited: Weights that did not train but differ from the parts.
        hooks: Made for the total number of steps.
        console: Where events are said.
        reads_tail: The model computes its last layer only where it is read.
        rehearsals: Steps of data that need most memory, rehearsed before the first step so that a
            device that is too small says so at once, each with what is most in it.
        strategy: How a step is spread over processes.
        cost: Counts the operations of a row; None where they are not known.
        peak_tflops: Matrix products measured on the device, TFLOP/s; None where they were not.
        advice: Says which setting would make rows fit that ran out of memory; None where the
            model cannot be planned.
    """

    recipe: Recipe
    opened: OpenRun
    device: Device
    model: nn.Module
    groups: Sequence[ParameterGroup]
    vocabulary_size: int
    sources: tuple[str, ...]
    data: StepSource
    data_fingerprint: str
    manifest: Callable[[int], Manifest]
    hooks: Callable[[int], list[Hook]]
    console: Console
    reads_tail: bool = False
    inherited: dict[str, torch.Tensor] = field(default_factory=dict)
    rehearsals: Mapping[int, str] = field(default_factory=dict)
    strategy: Strategy = field(default_factory=SingleProcess)
    cost: Callable[[Batch], int] | None = None
    peak_tflops: float | None = None
    advice: Callable[[Sequence[Batch]], str] | None = None


def fit(job: Job) -> TrainResult:
    """Runs a job to its end, to a stop signal, or to an error that says where it stopped.

    Raises:
        NonFiniteError: Loss or gradient norm is not finite.
        DataError: More rows could not be read than the recipe allows.
        CheckpointError: A checkpoint does not fit or cannot be written.
        TrainingError: The device is out of memory.
    """
    return _Steps(job).run()


def num_steps(recipe: Recipe, data: StepSource) -> int:
    """Returns the optimizer steps a recipe asks for; a fraction of an epoch is rounded up."""
    return sizes.num_steps(recipe.train, data.steps_per_epoch)


class _Steps:
    """The state of a running job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.recipe = job.recipe
        self.progress = job.opened.progress
        self.directory = job.opened.directory
        self.total_steps = num_steps(job.recipe, job.data)
        self.schedule = Schedule.of(job.recipe.train, total_steps=self.total_steps)
        self.peak_lrs = peak_lrs(job.groups)
        self.autocast = torch.bfloat16 if job.device.dtype == torch.bfloat16 else None
        self.samples_per_epoch = job.data.samples_per_epoch(0)
        self.clock = self._new_clock()
        resumed = job.opened.checkpoint is not None
        self.saved_step = self.progress.step if resumed else None
        self.first_loss: float | None = None
        self.final_loss: float | None = None

    def _new_clock(self) -> Clock:
        return Clock(self.job.cost, peak_tflops=self.job.peak_tflops, pad_tokens=self._pad_tokens())

    def run(self) -> TrainResult:
        """Restores, steps, saves."""
        started_s = time.perf_counter()
        module = self._prepare()
        if self.progress.step >= self.total_steps and self.job.opened.checkpoint is not None:
            self.job.console.print(f"the run is already complete ({self.total_steps} steps)")
            return self._result(0.0, None)
        hooks = self.job.hooks(self.total_steps)
        try:
            with StopRequest() as stop:
                self._rehearse(module)
                with write_errors_explained(self.directory.path):
                    for hook in hooks:
                        hook.on_start(self.progress.step)
                self.directory.forget_earlier()
                started_s = time.perf_counter()
                self._loop(module, hooks, stop)
                self._save()
        finally:
            for hook in hooks:
                hook.close()
            self.job.data.close()
        return self._result(time.perf_counter() - started_s, stop.signal_name)

    def _prepare(self) -> nn.Module:
        """Makes the optimizer and puts the checkpoint's state in place."""
        # The first optimizer of a process makes torch import its compiler: a second of CPU time.
        with collector_paused():
            return self._place()

    def _place(self) -> nn.Module:
        job = self.job
        module = LossModule(job.model, sources=job.sources, vocabulary_size=job.vocabulary_size)
        trainer = job.opened.trainer
        wrapped = job.strategy.prepare(
            module,
            lambda _: build_optimizer(job.model.named_parameters(), job.groups, self.recipe.train),
            restored=None if trainer is None else trainer["optimizer"],
        )
        if trainer is not None:
            self._require_same_work(trainer)
            set_random_state(trainer["rng"], job.device.torch_device)
        return wrapped

    def _require_same_work(self, trainer: dict[str, Any] | Any) -> None:
        before, now = trainer["work"], self._work()
        differing = [key for key in now if before.get(key) != now[key]]
        if self.schedule.shape == "constant" and self.schedule.warmup_steps == 0:
            differing = [key for key in differing if key != "schedule"]
        if differing:
            raise CheckpointError(
                "the data or the number format is not that of the run: resuming would not go on"
                " with the same run",
                where=str(self.job.opened.checkpoint),
                got=", ".join(f"{key}: {now[key]}" for key in differing),
                expected=", ".join(f"{key}: {before.get(key)}" for key in differing),
                fix="bring back the data and device of the run, or start a new run",
            )

    def _work(self) -> dict[str, Any]:
        """Returns what must be the same on resume and does not stand in the recipe."""
        return {
            "num_samples": self.job.data.num_samples,
            "data": self.job.data_fingerprint,
            "dtype": str(self.job.device.dtype),
            "schedule": asdict(self.schedule),
        }

    def _loop(self, module: nn.Module, hooks: list[Hook], stop: StopRequest) -> None:
        job, progress = self.job, self.progress
        steps = self._rows()
        self.clock = self._new_clock()
        while progress.step < self.total_steps and stop.signal_name is None:
            waiting_s = time.perf_counter()
            try:
                rows = next(steps)
            except DataError:
                # Ctrl-C reaches the workers too: they may be gone before this process asks them.
                if stop.signal_name is not None:
                    return
                raise
            self.clock.wait_s += time.perf_counter() - waiting_s
            progress.data_step += 1
            self._count_rejected(rows)
            what = f"at step {progress.step + 1}"
            sums = self._backward(module, rows, what=what)
            if not self._is_usable(sums, rows):
                job.strategy.step(lr_factor=None)
                continue
            factor = self.schedule.factor(progress.step)
            with self._out_of_memory_explained(rows, what=what):
                job.strategy.step(lr_factor=factor)
            self._count(sums, rows)
            self._after_step(sums, factor, hooks)

    def _rehearse(self, module: nn.Module) -> None:
        """Runs the heaviest steps' passes once and forgets them: weights and randomness stay."""
        job = self.job
        if not job.rehearsals:
            return
        state = random_state(job.device.torch_device)
        for data_step, most in job.rehearsals.items():
            rows = next(job.data.steps(data_step))
            what = f"while rehearsing {most}, before the first step"
            with self._out_of_memory_explained(rows, what=what):
                # The optimizer makes its state at the first update, so a fresh run has none yet.
                fresh = job.opened.trainer is None
                reserved = self._optimizer_state_to_come(module) if fresh else []
            self._backward(module, rows, what=what)
            del reserved
            job.strategy.step(lr_factor=None)
        set_random_state(state, job.device.torch_device)
        peak = job.device.peak_memory_gib()
        said = "" if peak is None else f"; peak {peak:.1f} GiB"
        job.console.print(f"rehearsed: {', '.join(job.rehearsals.values())}{said}", highlight=False)

    def _optimizer_state_to_come(self, module: nn.Module) -> list[torch.Tensor]:
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        num_bytes = sizes.resident_optimizer_bytes(count, self.recipe.train)
        return [torch.empty(num_bytes, dtype=torch.uint8, device=self.job.device.torch_device)]

    def _backward(self, module: nn.Module, rows: Sequence[Batch], *, what: str) -> StepSums:
        job = self.job
        with self._out_of_memory_explained(rows, what=what):
            return backward_step(
                job.strategy,
                module,
                rows,
                sources=job.sources,
                device=job.device.torch_device,
                autocast_dtype=self.autocast,
                clip_norm=self.recipe.train.clip_norm,
                reads_tail=job.reads_tail,
                pad_tokens=self._pad_tokens(),
            )

    def _pad_tokens(self) -> int | None:
        """Returns the length rows are padded to, which only compiled blocks ask for."""
        static = self.recipe.train.compile == "static_blocks"
        return self.recipe.batch.row_tokens if static else None

    def _rows(self) -> Iterator[list[Batch]]:
        """Yields the rows of each step; starting the workers leaves the random state alone.

        torch's DataLoader draws a seed for its workers from the generator that dropout uses, and
        does so once per process: a resumed run would draw once more than an uninterrupted one.
        """
        device = self.job.device.torch_device
        steps = self.job.data.steps(self.progress.data_step)
        state = random_state(device)
        first = next(steps)
        set_random_state(state, device)
        yield first
        yield from steps

    def _after_step(self, sums: StepSums, factor: float, hooks: list[Hook]) -> None:
        step = self.progress.step
        last = step == self.total_steps
        if step % self.recipe.log.every_steps == 0 or last:
            record = self._record(sums, factor)
            with write_errors_explained(self.directory.path):
                for hook in hooks:
                    hook.on_record(record)
        aside_s = time.perf_counter()
        with write_errors_explained(self.directory.path):
            for hook in hooks:
                hook.on_step(step, last=last)
        every = self.recipe.save.every_steps
        if every is not None and step % every == 0:
            self._save()
        self.clock.pause(time.perf_counter() - aside_s)

    def _record(self, sums: StepSums, factor: float) -> StepRecord:
        return self.clock.record(
            sums,
            self.progress,
            lr={role: lr * factor for role, lr in self.peak_lrs.items()},
            device=self.job.device,
            samples_per_epoch=self.samples_per_epoch,
        )

    def _count(self, sums: StepSums, rows: Sequence[Batch]) -> None:
        self.clock.add(sums, rows)
        self.progress.step += 1
        self.progress.num_samples += sums.num_samples
        self.progress.num_tokens += sums.num_tokens
        self.progress.num_target_tokens += sums.num_targets
        self.first_loss = sums.loss if self.first_loss is None else self.first_loss
        self.final_loss = sums.loss

    def _is_usable(self, sums: StepSums, rows: Sequence[Batch]) -> bool:
        """Says whether a step may update the weights; counts or raises when not."""
        if sums.num_targets == 0:
            return False  # every row of the step was rejected, and is counted as such
        if sums.is_finite:
            return True
        train, progress = self.recipe.train, self.progress
        ids = [sample_id for row in rows for sample_id in row.sample_ids]
        progress.skipped_steps += train.nonfinite == "skip"
        if train.nonfinite == "stop" or progress.skipped_steps > train.max_skipped_steps:
            raise nonfinite_error(sums, ids, step=progress.step + 1, skipped=progress.skipped_steps)
        entry = {
            "step": progress.step + 1,
            "data_step": progress.data_step,
            "loss": str(sums.loss),
            "grad_norm": str(sums.grad_norm),
            "sample_ids": ids,
        }
        append_json(self.directory.skipped, [entry])
        self.job.console.print(
            f"[yellow]step {progress.step + 1} skipped[/]: loss {sums.loss}, gradient norm"
            f" {sums.grad_norm}; samples in {self.directory.skipped}"
            f" ({progress.skipped_steps} of at most {train.max_skipped_steps})",
            soft_wrap=True,
        )
        return False

    def _count_rejected(self, rows: Sequence[Batch]) -> None:
        """Writes rows that failed in a worker to the quarantine; too many stop the run."""
        known = {(entry["source"], entry["where"]) for entry in self.progress.rejected}
        fresh = [
            rejected
            for row in rows
            for rejected in row.rejected
            if (rejected.source, rejected.where) not in known
        ]
        if not fresh:
            return
        entries = [asdict(rejected) for rejected in fresh]
        append_json(self.directory.quarantine, entries)
        self.progress.rejected += entries
        for rejected in fresh:
            self.job.console.print(
                f"[yellow]row not used[/]: {rejected.source}, {rejected.where}:"
                f" {rejected.detail} ({rejected.reason})",
                soft_wrap=True,
            )
        count, total = len(self.progress.rejected), self.job.data.num_samples
        if count > self.recipe.data.max_dropped_frac * total:
            worst = fresh[0]
            raise DataError(
                f"{count} of {total} rows could not be read while training, more than"
                f" data.max_dropped_frac ({self.recipe.data.max_dropped_frac:g}) allows",
                where=f"{worst.source}, {worst.where} (id {worst.id})",
                got=f"{worst.reason}: {worst.detail}",
                fix=f"{worst.fix}; or raise data.max_dropped_frac. All of them:"
                f" {self.directory.quarantine}",
            )

    def _save(self) -> None:
        """Writes a checkpoint of this very step, unless there is one."""
        job, progress = self.job, self.progress
        if self.saved_step == progress.step:
            return
        if self.directory.metrics.is_file():
            sync(self.directory.metrics)  # what is before the checkpoint must outlive it
        state = job.strategy.state()
        content = CheckpointContent(
            step=progress.step,
            weights=state.weights,
            inherited=job.inherited,
            parts=self.directory.parts if self.directory.parts.is_dir() else None,
            manifest=job.manifest(progress.step),
            trainer={
                "progress": progress.to_state(),
                "optimizer": state.optimizer,
                "rng": random_state(job.device.torch_device),
                "work": self._work(),
            },
        )
        save_checkpoint(
            self.directory.checkpoint(progress.step), content, keep=self.recipe.save.keep
        )
        self.saved_step = progress.step

    def _result(self, seconds: float, interrupted_by: str | None) -> TrainResult:
        progress = self.progress
        return TrainResult(
            run_dir=self.directory.path,
            checkpoint=self.directory.checkpoint(progress.step),
            steps=progress.step,
            total_steps=self.total_steps,
            first_loss=self.first_loss,
            final_loss=self.final_loss,
            seconds=seconds,
            skipped_steps=progress.skipped_steps,
            rejected_rows=len(progress.rejected),
            interrupted_by=interrupted_by if progress.step < self.total_steps else None,
            totals=self.clock.done,
            peak_tflops=self.job.peak_tflops,
            peak_memory_gib=self.job.device.peak_memory_gib(),
        )

    def _out_of_memory_explained(
        self, rows: Sequence[Batch], *, what: str
    ) -> AbstractContextManager[None]:
        return out_of_memory_explained(
            what=what,
            where=self.job.device.name,
            got=f"a row of {max(row.num_tokens for row in rows)} tokens",
            fix=lambda: step_fix(self.recipe, rows, self.job.advice),
        )


def append_json(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Appends entries to a JSON-lines file."""
    with write_errors_explained(path), path.open("a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

"""The training data of a run: checked once, then handed out in whole optimizer steps.

Worker processes read, encode and pack rows ahead of the training loop (torch's DataLoader moves the
tensors through shared memory). On Linux they are forked: that costs no import and shares the row
index, and it is safe here because a worker only parses, tokenises and decodes in its own thread -
it never touches a device, and torch is held to one thread, so it takes no lock that the parent may
have held. Elsewhere they are spawned.

A row of the dataset that fails in a worker is dropped and reported in `Batch.rejected`; nothing is
put in its place. Anything else that goes wrong in a worker stops the run with its traceback.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vistune.data.cache import cache_folder, write_once
from vistune.data.check import CheckReport, check_sources
from vistune.data.collate import pack_row
from vistune.data.encode import Encoder, Overlong
from vistune.data.formats import RowReader, open_source
from vistune.data.index.key import short_hash
from vistune.data.mix import Share, epoch_indices, epoch_sizes, grouped
from vistune.data.order import EpochPlan, StepPlan, plan_epoch
from vistune.data.rejects import reject
from vistune.errors import DataError, RowError
from vistune.recipe import BatchConfig, DataConfig
from vistune.types import Batch, EncodedSample, Rejected

_PREFETCH_ROWS = 256
"""Most rows that all workers together hold ready."""
_SAMPLES_WORTH_KEEPING = 50_000
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_ROWS = 64
"""Rows of one step that may stay in shared memory: each holds a file descriptor."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception of a worker that is no row's fault, as text."""

    text: str


@dataclass(frozen=True, slots=True)
class _Sent:
    """A row on its way from a worker: pixels in shared memory, all that is small as bytes.

    Every tensor in shared memory costs a file descriptor, and a step may hold hundreds of rows.
    """

    small: dict[str, npt.NDArray[Any]]
    rest: Batch

    @classmethod
    def of(cls, batch: Batch) -> _Sent:
        tensors = batch.tensors()
        pixels = tensors.pop("pixel_values_NCYX", None)
        empty = torch.empty(0)
        blank = dict.fromkeys(tensors, empty)
        small = {name: tensor.numpy() for name, tensor in tensors.items()}
        return cls(small, replace(batch, pixel_values_NCYX=pixels, **blank))  # type: ignore[arg-type]

    def open(self, *, copy: bool = False) -> Batch:
        small = {name: torch.from_numpy(array) for name, array in self.small.items()}
        pixels = self.rest.pixel_values_NCYX
        if copy and pixels is not None:
            pixels = pixels.clone()
        return replace(self.rest, pixel_values_NCYX=pixels, **small)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """Returns the row in page-locked memory (the loader's protocol)."""
        return self.open().pin_memory()


_Item: TypeAlias = Batch | _Sent | _Failure


@dataclass
class _Rows(Dataset[_Item]):
    """Makes one packed row from its dataset indices. Lives in the workers."""

    readers: tuple[RowReader, ...]
    accepted: tuple[npt.NDArray[np.int64], ...]
    encoder: Encoder
    max_tokens: int
    overlong: Overlong
    lengths: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        self._edges = np.cumsum([0, *(rows.size for rows in self.accepted)])

    def __getitem__(self, indices: tuple[int, ...]) -> _Item:
        try:
            row = self._row(indices)
            return row if get_worker_info() is None else _Sent.of(row)
        except Exception:
            return _Failure(traceback.format_exc())

    def _row(self, indices: tuple[int, ...]) -> Batch:
        began = time.perf_counter()
        samples: list[EncodedSample] = []
        rejected: list[Rejected] = []
        for index in indices:
            source = int(np.searchsorted(self._edges, index, side="right")) - 1
            reader = self.readers[source]
            row = int(self.accepted[source][index - self._edges[source]])
            id = None
            try:
                sample = reader.read(row)
                id = sample.id
                encoded = self.encoder.encode(
                    sample, max_tokens=self.max_tokens, overlong=self.overlong
                )
                self._require_planned(index, encoded)
                samples.append(encoded)
            except RowError as error:
                where = reader.where(row)
                rejected.append(reject(error, source=reader.name, where=where, id=id))
        return pack_row(samples, rejected=rejected, read_s=time.perf_counter() - began)

    def _require_planned(self, index: int, encoded: EncodedSample) -> None:
        planned, found = int(self.lengths[index]), int(encoded.input_ids.size)
        if planned != found:
            raise RowError(
                "the row or its images were changed since they were checked",
                reason="changed_since_check",
                got=f"{found} tokens",
                expected=planned,
                fix="check the dataset again: vistune data check",
            )


class _Order(Sampler[tuple[int, ...]]):
    """The rows of all steps from one on, epoch after epoch, without end."""

    def __init__(self, data: TrainData, start_step: int) -> None:
        self._data = data
        self._start_step = start_step

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for plan in self._data.plans(self._start_step):
            yield from plan.rows


class TrainData:
    """Checked sources, in the order of a run.

    Args:
        data: The recipe's `data`.
        batch: The recipe's `batch`.
        encoder: How rows become tokens and pixels.
        seed: Seed of the order.
        report: The result of `check_sources` on the same sources and limits; made here when left
            out.
        world_size: Number of ranks.
        rank: This rank.
        pin_memory: Hand out page-locked tensors (for a CUDA device).
        progress: Told (rows done, rows in all) while checking.

    Raises:
        DataError: A source cannot be opened, no row can be used, more rows than
            `data.max_dropped_frac` cannot, or a row is too long under `data.overlong=error`.
    """

    def __init__(
        self,
        data: DataConfig,
        batch: BatchConfig,
        encoder: Encoder,
        seed: int,
        *,
        report: CheckReport | None = None,
        world_size: int = 1,
        rank: int = 0,
        pin_memory: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if report is None:
            report = check_sources(
                data.train,
                encoder,
                max_tokens=batch.row_tokens,
                overlong=data.overlong,
                workers=data.workers,
                rank=rank,
                world_size=world_size,
                progress=progress,
            )
        require_usable(report, data)
        readers = report.readers or tuple(open_source(source) for source in data.train)
        self.report = report
        self.encoder = encoder
        self._data, self._batch, self._seed = data, batch, seed
        self._world_size, self._rank, self._pin_memory = world_size, rank, pin_memory
        self._rows = _Rows(
            readers, report.accepted, encoder, batch.row_tokens, data.overlong, report.lengths
        )
        self._shares = [
            Share.of(source, rows.size)
            for source, rows in zip(data.train, report.accepted, strict=True)
        ]
        if not sum(epoch_sizes(self._shares)):
            raise DataError(
                "an epoch of the run holds no sample",
                where="data.train[].epochs",
                got=[source.epochs for source in data.train],
                fix="raise it",
            )
        self._plans: dict[int, EpochPlan] = {}
        self._iterator: Iterator[_Item] | None = None
        self._generation = 0

    @property
    def num_samples(self) -> int:
        """Usable samples of all sources, each counted once."""
        return self.report.num_ok

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Returns the optimizer steps of an epoch (packing can make epochs differ by a few)."""
        if self._batch.samples is not None:
            return -(-self.samples_per_epoch() // self._batch.samples)
        return len(self._plan(epoch))

    def samples_per_epoch(self, epoch: int = 0) -> int:
        """Returns the samples of an epoch, `epochs` of every source taken into account."""
        return sum(epoch_sizes(self._shares))

    def plans(self, start_step: int = 0) -> Iterator[StepPlan]:
        """Yields this rank's steps from `start_step` on, epoch after epoch, without end."""
        epoch, behind = 0, start_step
        if self._batch.samples is not None:  # then every epoch has the same number of steps
            epoch, behind = divmod(start_step, self.steps_per_epoch())
        while behind >= len(self._plan(epoch)):
            behind -= len(self._plan(epoch))
            epoch += 1
        while True:
            yield from self._plan(epoch).from_step(behind)
            epoch, behind = epoch + 1, 0

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields all rows of one optimizer step of this rank at a time, without end.

        A later call, or `close`, ends an earlier one.

        Args:
            start_step: Steps already done; their images are not read again.

        Raises:
            DataError: A worker process died, or failed for another reason than a row.
        """
        self.close()
        mine = self._generation
        self._iterator = iter(self._loader(start_step))
        for plan in self.plans(start_step):
            if self._generation != mine:
                return
            yield [self._next(copy=len(plan.rows) > _SHARED_ROWS) for _ in plan.rows]

    def close(self) -> None:
        """Ends the worker processes; an iterator that `steps` gave ends with them."""
        self._generation += 1
        self._iterator = None

    def _next(self, *, copy: bool) -> Batch:
        assert self._iterator is not None
        try:
            item = next(self._iterator)
        except RuntimeError as error:
            raise DataError(
                f"a data worker died: {error}",
                fix="data.workers=0 runs in this process and shows the cause; in a container, a"
                " small /dev/shm kills workers (docker run --shm-size=8g)",
            ) from error
        if isinstance(item, _Failure):
            raise DataError(f"a data worker failed:\n{item.text}", fix="report this as a bug")
        return item.open(copy=copy) if isinstance(item, _Sent) else item

    def _loader(self, start_step: int) -> DataLoader[_Item]:
        workers = self._data.workers
        extra: dict[str, Any] = {}
        if workers:
            extra = {
                "prefetch_factor": self._prefetch_rows(workers),
                "worker_init_fn": _start_worker,
                "multiprocessing_context": "fork" if sys.platform == "linux" else "spawn",
            }
        return DataLoader(
            self._rows,
            sampler=_Order(self, start_step),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._pin_memory,
            **extra,
        )

    def _prefetch_rows(self, workers: int) -> int:
        """Rows every worker holds ready: together a step and a half, as memory allows."""
        plan = self._plan(0)
        rows, samples = plan.max_rows, plan.max_samples
        images = samples * self.report.num_images / self.report.num_ok
        row_bytes = self.encoder.image_bytes * images / rows
        room = min(rows * 1.5, _PREFETCH_ROWS)
        if row_bytes and _SHARED_MEMORY.is_dir():
            room = min(room, shutil.disk_usage(_SHARED_MEMORY).free / 2 / row_bytes)
        return max(2, math.ceil(room / workers))

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            while len(self._plans) > 1:  # the loader runs ahead by an epoch at most
                del self._plans[min(self._plans)]
            self._plans[epoch] = self._kept_plan(epoch)
        return self._plans[epoch]

    def _kept_plan(self, epoch: int) -> EpochPlan:
        """Returns the plan of an epoch; a long one is kept on disk for the next start."""
        if self.num_samples < _SAMPLES_WORTH_KEEPING:
            return self._new_plan(epoch)
        path = cache_folder("plans") / f"{self._plan_key(epoch)}.npz"
        try:
            return EpochPlan.load(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
        plan = self._new_plan(epoch)
        write_once(path, plan.save)
        return plan

    def _plan_key(self, epoch: int) -> str:
        report = self.report
        facts = {
            "layout": 1,
            "lengths": [
                hashlib.blake2b(np.ascontiguousarray(a).tobytes(), digest_size=16).hexdigest()
                for a in (report.lengths, report.image_tokens)
            ],
            "shares": [asdict(share) for share in self._shares],
            "batch": self._batch.model_dump(mode="json"),
            "order": [self._data.shuffle, self._data.group_by, self._seed, epoch],
            "ranks": [self._world_size, self._rank],
        }
        return short_hash(facts)

    def _new_plan(self, epoch: int) -> EpochPlan:
        report, batch = self.report, self._batch
        indices = epoch_indices(
            self._shares, seed=self._seed, epoch=epoch, shuffle=self._data.shuffle
        )
        step_samples = batch.samples
        if step_samples is None:
            assert batch.tokens is not None
            step_samples = max(1, round(batch.tokens * report.num_ok / report.num_tokens))
        indices = grouped(
            indices,
            report.lengths,
            report.image_tokens > 0,
            by=self._data.group_by,
            step_samples=step_samples,
            seed=self._seed,
            epoch=epoch,
        )
        return plan_epoch(
            report.lengths,
            batch,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._data.shuffle,
            world_size=self._world_size,
            rank=self._rank,
            indices=indices,
            image_tokens=report.image_tokens,
        )


def require_usable(report: CheckReport, data: DataConfig) -> None:
    """Refuses data of which too much cannot be used.

    Raises:
        DataError: No row can be used, more than `data.max_dropped_frac` cannot, or one is too long
            under `data.overlong=error`; with the table of reasons.
    """
    table = report.table()
    overlong = report.by_reason().get("overlong", 0)
    if overlong and data.overlong == "error":
        raise DataError(
            f"{overlong} of {report.total_rows} rows are longer than batch.max_tokens:\n{table}",
            where="data.overlong",
            got="error",
            fix="raise batch.max_tokens, or set data.overlong to drop or truncate_text",
        )
    if not report.num_ok:
        raise DataError(f"none of {report.total_rows} rows can be used:\n{table}")
    if report.rejected_frac > data.max_dropped_frac:
        raise DataError(
            f"{len(report.rejected)} of {report.total_rows} rows cannot be used:\n{table}",
            where="data.max_dropped_frac",
            got=f"{report.rejected_frac:.6f}",
            expected=f"at most {data.max_dropped_frac}",
            fix="mend the rows, or raise data.max_dropped_frac to go on without them",
        )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)

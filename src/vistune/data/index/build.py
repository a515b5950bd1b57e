"""Builds an index in units of rows, by as many processes and machines as there are.

Nobody is in charge. Every process of every rank goes through the same list of units, takes one that
nobody has claimed, and writes its part under a temporary name that it renames. Who finds all parts
there joins them, the same way. So a build goes on where a killed one stopped, a rank that is late
finds the work done, and none waits idly while another works. Claims only save work: should two
processes do the same unit, both write the same bytes.

All of it rests on two promises of a file system, kept by NFS, Lustre and GPFS too: a rename is
whole, and a file made with O_EXCL is made once. A claim whose owner has not touched it for a minute
is void; time is that of the file system.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.data.index.columns import SourceIndex
from vistune.data.index.scan import RowScan
from vistune.data.orphans import end_with_parent
from vistune.errors import DataError

_STALE_S = 60.0
_TOUCH_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Build:
    """The build of one index.

    Args:
        folder: Where the finished index will be.
        scan: Reads the rows.
        num_rows: Rows of the source.
        unit_rows: Rows of one unit.
        meta: Kept beside the index, to be read by people.
        start_frac: Where in the list of units this rank begins, in [0, 1).
    """

    folder: Path
    scan: RowScan
    num_rows: int
    unit_rows: int
    meta: dict[str, Any]
    start_frac: float = 0.0

    @property
    def parts(self) -> Path:
        """The folder of what is done so far."""
        return self.folder.with_name(f"{self.folder.name}.parts")

    @property
    def num_units(self) -> int:
        """Number of units."""
        return -(-self.num_rows // self.unit_rows)

    def done(self) -> set[int]:
        """Returns the units that are done."""
        # `glob` on a folder that is not there (yet, or any more) gives nothing.
        return {int(path.name[5:]) for path in self.parts.glob("done-*")}

    def work(self, *, offset: int = 0) -> None:
        """Does units until all are done, by this process or others.

        Args:
            offset: Where this process begins, in units behind its rank's.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        first = int(self.num_units * self.start_frac) + offset
        order = [(first + k) % self.num_units for k in range(self.num_units)]
        while not self.folder.exists():
            done = self.done()
            todo = [unit for unit in order if unit not in done]
            if not todo:
                return
            taken = [unit for unit in todo if self._take(unit)]
            if not taken:
                time.sleep(_POLL_S)

    def _take(self, unit: int) -> bool:
        target = self.parts / f"done-{unit}"
        if target.exists() or self.folder.exists():
            return False
        claim = _Claim(self.parts / f"claim-{unit}")
        if not claim.take():
            return False
        rows = range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.num_rows))
        _write_folder(target, self.scan.rows(rows, alive=claim.touch), meta={})
        claim.drop()
        return True

    def join(self) -> None:
        """Makes the index of its parts, unless another process does; returns when it is there."""
        claim = _Claim(self.parts / "claim-join")
        while not self.folder.exists():
            if not claim.take():
                time.sleep(_POLL_S)
                continue
            parts = [
                SourceIndex.load(self.parts / f"done-{k}", mapped=False)
                for k in range(self.num_units)
            ]
            _write_folder(self.folder, SourceIndex.joined(parts), meta=self.meta)
            del parts
            shutil.rmtree(self.parts, ignore_errors=True)


class _Claim:
    """A file that says that somebody is at work."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._touched_s = 0.0

    def take(self) -> bool:
        """Returns whether the work is ours."""
        for _ in range(2):
            try:
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                if not self._is_stale():
                    return False
                self._path.unlink(missing_ok=True)
            except FileNotFoundError:
                return False  # the parts were joined and removed
            else:
                self._touched_s = time.monotonic()
                return True
        return False

    def _is_stale(self) -> bool:
        try:
            with tempfile.TemporaryFile(dir=self._path.parent) as now:
                age_s = os.fstat(now.fileno()).st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return False
        return age_s > _STALE_S

    def touch(self) -> None:
        """Says that the work goes on."""
        now_s = time.monotonic()
        if now_s - self._touched_s > _TOUCH_S:
            self._touched_s = now_s
            self._path.touch()

    def drop(self) -> None:
        """Ends the claim; the work is there for all to see."""
        self._path.unlink(missing_ok=True)


def _write_folder(target: Path, index: SourceIndex, *, meta: dict[str, Any]) -> None:
    """Writes an index whole or not at all; one that is there already is kept."""
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix="tmp-"))
    try:
        draft.chmod(0o755)
        index.save(draft, meta=meta)
        draft.rename(target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def build(task: Build, *, workers: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Builds an index, or waits for the last units that other ranks are at.

    Args:
        task: What to build.
        workers: Processes; 0 works in this one.
        progress: Told (rows done by anyone, rows in all).

    Raises:
        DataError: A process died.
    """
    if workers == 0:
        task.work()
    else:
        for done in _in_processes(task, workers):
            if progress is not None:
                progress(min(done * task.unit_rows, task.num_rows), task.num_rows)
    task.join()
    if progress is not None:
        progress(task.num_rows, task.num_rows)


def _in_processes(task: Build, workers: int) -> Iterator[int]:
    # Forking costs nothing and shares the row index; this runs before any device or thread of ours
    # exists. Where forking is unsafe (macOS) or missing, processes start afresh.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    number = max(1, min(workers, task.num_units))
    with ProcessPoolExecutor(number, context, _Process.start, (task,)) as pool:
        waiting: list[Future[None]] = [
            pool.submit(_Process.run, k * task.num_units // number) for k in range(number)
        ]
        try:
            while waiting:
                time.sleep(_POLL_S)
                yield len(task.done())
                for future in [one for one in waiting if one.done()]:
                    waiting.remove(future)
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that checked rows died, most likely killed for memory",
                fix="data.workers=0, or fewer",
            ) from error


class _Process:
    """The work of this worker process; set once by the pool's initializer."""

    task: Build

    @classmethod
    def start(cls, task: Build) -> None:
        end_with_parent()
        cls.task = task

    @classmethod
    def run(cls, offset: int) -> None:
        cls.task.work(offset=offset)

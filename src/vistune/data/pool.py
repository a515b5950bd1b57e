"""Runs one job over many units in worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vistune.data.orphans import end_with_parent
from vistune.errors import DataError

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")


class _Process:
    """The job of this worker process; set once by the pool's initializer."""

    job: Callable[[Any], Any]

    @classmethod
    def start(cls, job: Callable[[Any], Any]) -> None:
        end_with_parent()
        cls.job = job

    @classmethod
    def run(cls, unit: Any) -> Any:
        return cls.job(unit)


def in_processes(
    job: Callable[[UnitT], ResultT], units: Sequence[UnitT], *, workers: int, fix: str
) -> Iterator[ResultT]:
    """Yields the job's result for every unit, in order.

    Args:
        job: Sent to every worker once; a bound method of something that can be pickled.
        units: What it is called with, one by one. A single one is done in this process.
        workers: Most processes; with fewer than two all is done in this one.
        fix: What helps when a worker is killed, for the message.

    Raises:
        DataError: A worker died.
    """
    if workers < 2 or len(units) < 2:
        yield from map(job, units)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(units)), context, _Process.start, (job,)) as pool:
            yield from pool.map(_Process.run, units)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that checked rows died, most likely killed for memory", fix=fix
        ) from error

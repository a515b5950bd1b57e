"""The lock of a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vistune.checkpoint.run_dir import RunDirectory
from vistune.errors import CheckpointError

fcntl = pytest.importorskip("fcntl")
HELD_S = 1.0


def test_a_running_run_is_not_waited_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with (
        run.lock(),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
        run.lock(),
    ):
        pass


def test_workers_of_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with (tmp_path / ".lock").open("w") as file:
        file.write(f"process {gone.pid}")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        worker = subprocess.Popen(
            [sys.executable, "-c", f"import time; time.sleep({HELD_S})"],
            pass_fds=(file.fileno(),),
        )
    start_s = time.monotonic()
    with RunDirectory(tmp_path).lock():
        waited_s = time.monotonic() - start_s
    worker.wait()
    assert waited_s > HELD_S / 2  # the worker started before; half of it leaves slack

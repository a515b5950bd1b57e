"""The lock of a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vistune.checkpoint import run_dir
from vistune.checkpoint.run_dir import RunDirectory
from vistune.errors import CheckpointError

fcntl = pytest.importorskip("fcntl")
HELD_S = 1.0


def test_a_running_run_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "_DYING_S", 0.1)
    run = RunDirectory(tmp_path)
    with (
        run.lock(),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
        run.lock(),
    ):
        pass


@pytest.mark.parametrize("is_zombie", [False, True])
def test_workers_of_a_killed_run_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zombie: bool
) -> None:
    """Also while nobody has asked for the killed process: the system still lists it."""
    if is_zombie and not Path("/proc/self/stat").is_file():
        pytest.skip("asks Linux for a process's state")
    monkeypatch.setattr(run_dir, "_DYING_S", 0.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    if is_zombie:
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    else:
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
    gone.wait()
    assert waited_s > HELD_S / 2  # the worker started before; half of it leaves slack


def test_a_process_that_is_about_to_die_is_waited_for(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        dying = subprocess.Popen(
            [sys.executable, "-c", f"import time; time.sleep({HELD_S})"],
            pass_fds=(file.fileno(),),
        )
        file.write(f"process {dying.pid}")
    with RunDirectory(tmp_path).lock():
        pass
    assert dying.wait() == 0

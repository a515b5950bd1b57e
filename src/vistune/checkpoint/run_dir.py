"""Where a run's files are, by name. Writes nothing but the opening records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.checkpoint.described import PARTS_NAME
from vistune.errors import CheckpointError
from vistune.recipe import ResolvedRecipe

CHECKPOINT_PREFIX = "step_"
_EARLIER, _MOVING = ".earlier", ".earlier_moving"  # whole, and on its way in or out
_ORPHANS_S = 15.0  # loader workers inherit the lock, and outlive a killed run by some seconds
_DYING_S = 2.0  # a process that was just killed is there until its memory is given back


@dataclass(frozen=True)
class RunDirectory:
    """Names the files of one training run.

    Args:
        path: The directory.
    """

    path: Path

    @classmethod
    def of(cls, resolved: ResolvedRecipe) -> RunDirectory:
        """Returns the directory a recipe asks for."""
        recipe = resolved.recipe
        return cls(Path(recipe.run_dir) if recipe.run_dir else Path("runs") / recipe.name)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        """Origin of each value, versions, git state, device: one JSON object per start."""
        return self.path / "provenance.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """Sample answers, one text file per time."""
        return self.path / "samples"

    @property
    def settled(self) -> Path:
        """What was chosen for settings the recipe leaves to the device's memory."""
        return self.path / "settled.json"

    @property
    def check_report(self) -> Path:
        """The data check, machine-readable."""
        return self.path / "check.json"

    @property
    def quarantine(self) -> Path:
        """Rows that were not used."""
        return self.path / "quarantine.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per optimizer step skipped for a loss or norm that was not finite."""
        return self.path / "skipped.jsonl"

    @property
    def parts(self) -> Path:
        """The small files of the model's parts, as they were when the run started."""
        return self.path / PARTS_NAME

    @property
    def checkpoints(self) -> Path:
        """Parent of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Returns the directory of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"{CHECKPOINT_PREFIX}{step:08d}"

    def open_new(self, *, overwrite: bool = False) -> None:
        """Creates the directory.

        Raises:
            CheckpointError: It already holds a run.
        """
        if self.recipe.exists() and not overwrite:
            raise CheckpointError(
                "this directory already holds a run",
                where=str(self.path),
                fix="add --resume to go on with it, --overwrite to discard it, or name another"
                " with run_dir=...",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the run directory cannot be made: {error.strerror}",
                where=str(self.path),
                fix="name another with run_dir=...",
            ) from error

    @property
    def failed_start(self) -> Path:
        """What a start wrote that was to replace a run and failed before its first step."""
        return self.path / "failed_start"

    def _owned(self) -> list[Path]:
        """Returns what of a run's files is there, and nothing else that may lie here."""
        folders = (self.checkpoints, self.tensorboard, self.samples, self.parts)
        records = (self.recipe, self.provenance, self.metrics, self.skipped)
        files = (*records, self.settled, self.check_report, self.quarantine)
        return [path for path in (*folders, *files) if path.exists()]

    def set_aside(self) -> None:
        """Moves a run out of the way of a new one, until `forget_earlier` or `bring_back`."""
        moving = self.path / _MOVING
        self.forget_earlier()
        moving.mkdir(exist_ok=True)
        for path in self._owned():
            path.rename(moving / path.name)
        moving.rename(self.path / _EARLIER)

    def forget_earlier(self) -> None:
        """Deletes the run that was set aside, and what failed to replace it: one is under way."""
        for folder in (self.path / _EARLIER, self.failed_start):
            shutil.rmtree(folder, ignore_errors=True)

    def bring_back(self) -> bool:
        """Puts a run back that was set aside; what took its place goes to `failed_start`.

        A process that was killed on the way leaves what the next call puts right.

        Returns:
            Whether there was one.
        """
        earlier, moving = self.path / _EARLIER, self.path / _MOVING
        if earlier.is_dir():
            shutil.rmtree(self.failed_start, ignore_errors=True)
            self.failed_start.mkdir()
            for path in self._owned():
                path.rename(self.failed_start / path.name)
            earlier.rename(moving)
        elif not moving.is_dir():
            return False
        for path in moving.iterdir():
            path.rename(self.path / path.name)
        moving.rmdir()
        return True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process, so that two runs never write into it at once.

        The system lets go of the lock when the process ends, however it ends.

        Raises:
            CheckpointError: Another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # a system without POSIX locks: nothing to hold
            yield
            return
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            began_s = time.monotonic()
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    file.seek(0)
                    holder = file.read().strip()
                    patience_s = _ORPHANS_S if _is_gone(holder) else _DYING_S
                    if time.monotonic() - began_s < patience_s:
                        time.sleep(0.1)
                        continue
                    raise CheckpointError(
                        f"another process ({holder}) is training in this directory",
                        where=str(self.path),
                        fix="wait for it or stop it, or name another directory with run_dir=...",
                    ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def record_start(
        self, resolved: ResolvedRecipe, *, versions: dict[str, str], device: str, resumed_from: int
    ) -> None:
        """Writes the resolved recipe and what decides this start's results, before a model loads.

        Args:
            resolved: The recipe with its sources.
            versions: Package versions.
            device: Name of the device.
            resumed_from: Optimizer steps done before this start; 0 for a new run.
        """
        self.recipe.write_text(resolved.to_yaml(), encoding="utf-8")
        entry: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "recipe_file": resolved.origin,
            "resumed_from_step": resumed_from,
            "device": device,
            "versions": versions,
            "git": _git_state(),
            "sources": dict(resolved.sources),
        }
        self._record(entry)

    def record_engine(self, engine: Mapping[str, Any]) -> None:
        """Writes down how the model of this start computes, which is known once it is built.

        Args:
            engine: What was chosen, with reasons: attention, kernels, and the like.
        """
        self._record({"engine": dict(engine)})

    def last_engine(self) -> dict[str, Any] | None:
        """Returns what `record_engine` wrote last; None where a start never came so far."""
        if not self.provenance.is_file():
            return None
        entries = map(_object_of, self.provenance.read_text(encoding="utf-8").splitlines())
        engines = [entry["engine"] for entry in entries if "engine" in entry]
        return engines[-1] if engines else None

    def _record(self, entry: Mapping[str, Any]) -> None:
        with self.provenance.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                # A killed process may have left half a line, which must not swallow this one.
                file.write(b"\n" if file.read(1) != b"\n" else b"")
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def _is_gone(holder: str) -> bool:
    """Returns whether the process that a lock file names has ended, waited for or not."""
    try:
        process = int(holder.removeprefix("process "))
        os.kill(process, 0)
        # Linux: one that nobody has waited for is still listed, as a zombie (Z).
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except ProcessLookupError:
        return True
    except (ValueError, OSError):
        return False
    return state.split()[:1] == ["Z"]


def _object_of(line: str) -> dict[str, Any]:
    """Returns a line's entry; an empty one for a line that a killed process cut short."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _git_state() -> dict[str, str | bool] | None:
    """Returns commit and cleanliness of the working directory's repository, None outside one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}

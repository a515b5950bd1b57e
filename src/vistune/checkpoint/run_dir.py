"""Where a run's files are, by name. Writes nothing but the opening records."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.errors import CheckpointError
from vistune.recipe import ResolvedRecipe

CHECKPOINT_PREFIX = "step_"


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
    def check_report(self) -> Path:
        """The data check, machine-readable."""
        return self.path / "check.json"

    @property
    def quarantine(self) -> Path:
        """Rows that were not used."""
        return self.path / "quarantine.jsonl"

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
        self.path.mkdir(parents=True, exist_ok=True)

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
        with self.provenance.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


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

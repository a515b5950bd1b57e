"""Opens a run directory: a new one, a discarded one, or one to go on with from its checkpoint.

Everything that could make a resumed run differ from an uninterrupted one is settled here, before a
model loads: which checkpoint, whether the recipe is still the same, and the metrics written after
the checkpoint, which are cut off because their steps are run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from vistune.checkpoint.files import sync
from vistune.checkpoint.load import newest_checkpoint, read_trainer_state
from vistune.checkpoint.manifest import read_manifest
from vistune.checkpoint.run_dir import RunDirectory
from vistune.checkpoint.save import remove_stale
from vistune.errors import CheckpointError
from vistune.recipe import Recipe, ResolvedRecipe
from vistune.train.state import Progress

FREE_KEYS = (
    "name",
    "description",
    "run_dir",
    "device",
    "model.vision_tower.path",
    "model.language_model.path",
    "model.bases",
    "data.workers",
    "data.max_dropped_frac",
    "train.threads",
    "train.nonfinite",
    "train.max_skipped_steps",
    "train.checkpoint_layers",
    "train.checkpoint_tower_layers",
    "train.offload",
    "save",
    "log",
    "sample",
)
"""Keys that may differ on resume: they change what is written, where it runs, where unchanged
parts lie, how fast or when it gives up, and not what is learnt."""

LENGTH_KEYS = ("train.steps", "train.epochs")
"""Keys that may differ on resume as long as the learning rate is the same either way: a constant
schedule without warm-up. Any other curve is stretched over the whole run."""


@dataclass(frozen=True)
class OpenRun:
    """A run directory ready to be written, and what is already in it.

    Args:
        directory: Where the run's files are.
        checkpoint: The checkpoint gone on from, or None.
        trainer: Its training state.
        progress: Where the run is.
        resumed: Whether it goes on with what is there.
    """

    directory: RunDirectory
    checkpoint: Path | None
    trainer: Mapping[str, Any] | None
    progress: Progress
    resumed: bool = True

    def set_aside_earlier(self, *, needed: Path | None = None) -> None:
        """Moves what an earlier run left here out of the way, unless this run goes on with it.

        It is deleted when the first step begins. Whatever ends this run before that (a setting that
        does not fit the model, data, memory, Ctrl-C) brings it back.

        Args:
            needed: What this run reads while it starts, or None.

        Raises:
            CheckpointError: That lies here.
        """
        if self.resumed:
            return
        if needed is not None and needed.resolve().is_relative_to(self.directory.path.resolve()):
            raise CheckpointError(
                "the run would discard the checkpoint it goes on from",
                where=str(self.directory.path),
                got=f"model.from_checkpoint: {needed}",
                fix="name another directory with run_dir=...",
            )
        if self.directory.recipe.is_file():  # without one, nothing in here is known to be ours
            self.directory.set_aside()


@contextmanager
def open_run(
    resolved: ResolvedRecipe, *, resume: bool, overwrite: bool, console: Console
) -> Iterator[OpenRun]:
    """Opens the recipe's run directory and holds it until the context ends; deletes nothing.

    Args:
        resolved: The recipe.
        resume: Go on from the newest whole checkpoint.
        overwrite: Discard a run that is already there.
        console: Where what was found is said.

    Raises:
        CheckpointError: The directory is in use, holds a run that is neither resumed nor
            discarded, has none to resume, or its recipe is another.
    """
    directory = RunDirectory.of(resolved)
    if resume and not directory.recipe.is_file():
        raise CheckpointError(
            "there is no run to resume in this directory",
            where=str(directory.path),
            fix="leave out --resume to start one",
        )
    if not resume:
        _open_new(directory, overwrite=overwrite)
    with directory.lock():
        if directory.bring_back() and not resume:  # a start that was killed before its first step
            _open_new(directory, overwrite=overwrite)
        if resume:
            yield _resume(directory, resolved, console)
            return
        try:
            yield OpenRun(directory, None, None, Progress(), resumed=False)
        except BaseException:
            if directory.bring_back():
                console.print(
                    f"the earlier run in {directory.path} is as it was; what this start wrote is"
                    f" in {directory.failed_start}",
                    soft_wrap=True,
                    markup=False,
                )
            raise


def _open_new(directory: RunDirectory, *, overwrite: bool) -> None:
    # A start that ended before its first step left nothing to lose.
    directory.open_new(overwrite=overwrite or not _has_steps(directory))


def _has_steps(directory: RunDirectory) -> bool:
    """Whether a run in this directory did any step that was written down."""
    logged = directory.metrics.is_file() and directory.metrics.stat().st_size > 0
    saved = directory.checkpoints.is_dir() and any(directory.checkpoints.iterdir())
    return logged or saved


def _resume(directory: RunDirectory, resolved: ResolvedRecipe, console: Console) -> OpenRun:
    for path in remove_stale(directory.checkpoints):
        console.print(f"removed an unfinished checkpoint: {path}", soft_wrap=True)
    found = newest_checkpoint(directory.checkpoints)
    if found is None:
        console.print("no checkpoint was written yet: starting again from step 0")
        require_same_recipe(_recorded_recipe(directory), resolved, where=directory.recipe)
        keep_lines(directory.metrics, key="step", last=0)
        keep_lines(directory.skipped, key="data_step", last=0)
        return OpenRun(directory, None, None, Progress())
    for sentence in found.damaged:
        console.print(f"[yellow]damaged checkpoint not used:[/] {sentence}", soft_wrap=True)
    require_same_recipe(
        read_manifest(found.folder).recipe, resolved, where=found.folder, step=found.step
    )
    trainer = read_trainer_state(found.folder)
    progress = Progress.from_state(trainer["progress"])
    keep_lines(directory.metrics, key="step", last=progress.step)
    keep_lines(directory.skipped, key="data_step", last=progress.data_step)
    which = "the one before" if found.damaged else "its newest checkpoint"
    console.print(f"resuming from {which}: {found.folder} (step {progress.step})", soft_wrap=True)
    return OpenRun(directory, found.folder, trainer, progress)


def _recorded_recipe(directory: RunDirectory) -> dict[str, Any]:
    import yaml

    recorded = yaml.safe_load(directory.recipe.read_text(encoding="utf-8"))
    return recorded if isinstance(recorded, dict) else {}


def require_same_recipe(
    before: Mapping[str, Any], resolved: ResolvedRecipe, *, where: Path, step: int = 0
) -> None:
    """Refuses to resume with a recipe that would learn something else.

    Args:
        before: The recipe the run was started with.
        resolved: The recipe now.
        where: Where `before` was read.
        step: Optimizer steps done.

    Raises:
        CheckpointError: Keys beyond `FREE_KEYS` (and, where they may, `LENGTH_KEYS`) differ.
    """
    after = resolved.recipe.model_dump(mode="json")
    train = resolved.recipe.train
    free: tuple[str, ...] = FREE_KEYS
    if train.schedule == "constant" and train.warmup_frac == 0:
        free += LENGTH_KEYS
    old, new = _flatten(_with_todays_defaults(before)), _flatten(after)
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if not differing:
        return
    lines = [f"{k}: {old.get(k)!r} -> {new.get(k)!r} ({resolved.source_of(k)})" for k in differing]
    stretched = any(key in LENGTH_KEYS for key in differing)
    raise CheckpointError(
        "the recipe is not the one this run was started with:"
        + (" 1 key differs" if len(differing) == 1 else f" {len(differing)} keys differ"),
        where=str(where),
        got="\n            ".join(lines),
        expected="the same values; free to change: " + ", ".join(FREE_KEYS),
        fix=(
            f"the {train.schedule} schedule is laid over the whole run, so its length is fixed; "
            if stretched
            else ""
        )
        + "put them back, or start a new run (model.from_checkpoint goes on from these weights)",
    )


def _with_todays_defaults(before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a recorded recipe with the keys that did not exist yet at their defaults.

    One that does not parse any more stays as it is, so that what differs is named.
    """
    try:
        return Recipe.model_validate(before).model_dump(mode="json")
    except ValidationError:
        return before


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value; empty collections count as values."""
    if isinstance(tree, Mapping) and tree:
        entries: Any = tree.items()
    elif isinstance(tree, list | tuple) and tree:
        entries = enumerate(tree)
    else:
        return {prefix: tree if not isinstance(tree, tuple) else list(tree)}
    found: dict[str, Any] = {}
    for key, value in entries:
        found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def keep_lines(path: Path, *, key: str, last: int) -> None:
    """Cuts a JSON-lines file after the last entry whose `key` is at most `last`.

    A line cut short by a killed process goes too. The file is replaced in one piece.
    """
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)[key] <= last:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    sync(temporary)
    temporary.replace(path)

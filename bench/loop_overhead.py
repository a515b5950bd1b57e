"""What the loop costs beside its arithmetic: `vistune.train` against a bare torch loop.

    python bench/loop_overhead.py [--steps 60] [--repeats 6]

Both do the same forward, backward, clipping and AdamW on the same packed rows, made beforehand, in
one process with one thread. The loop's side includes its non-finite check, metrics, TensorBoard and
console hooks. Times are CPU seconds; the two take turns, and the median of the turns counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from our_loop import recipe
from vistune.checkpoint.manifest import Manifest
from vistune.device import Device
from vistune.train.fit import Job, fit
from vistune.train.hooks import ConsoleHook, MetricsHook, TensorBoardHook
from vistune.train.opening import open_run
from vistune.types import Batch

MAX_RATIO = 1.10


@dataclass
class Ready:
    """Rows that are already in memory."""

    rows: list[list[Batch]]
    num_samples: int = 512

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps there are."""
        return len(self.rows)

    def samples_per_epoch(self, epoch: int = 0) -> int:
        """Samples there are."""
        return self.num_samples

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yields the rows of each step."""
        yield from self.rows[start_step:]

    def close(self) -> None:
        """There are no workers to end."""


def bare(model: Any, groups: Any, steps: list[list[Batch]]) -> list[float]:
    named = dict(model.named_parameters())
    trained = [named[name] for group in groups for name in group.names]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    losses = []
    for rows in steps:
        count = sum(row.num_targets for row in rows)
        total = 0.0
        for row in rows:
            hidden_BTD = model.hidden_states(
                input_ids_BT=row.input_ids_BT,
                position_ids_BT=row.position_ids_BT,
                cu_seqlens=row.cu_seqlens,
                max_seqlen=row.max_seqlen,
                pixel_values_NCYX=row.pixel_values_NCYX,
            )
            logits_MV = model.logits(hidden_BTD[0, row.target_index_M])
            loss = F.cross_entropy(logits_MV, row.target_ids_M, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def looped(model: Any, groups: Any, steps: list[list[Batch]], resolved: Any) -> list[float]:
    console = Console(quiet=True)
    with open_run(resolved, resume=False, overwrite=True, console=console) as opened:
        job = Job(
            recipe=resolved.recipe,
            opened=opened,
            device=Device(torch.device("cpu"), "cpu", torch.float32),
            model=model,
            groups=groups,
            vocabulary_size=1024,
            sources=("train",),
            data=Ready(steps),
            data_fingerprint="bench",
            manifest=lambda step: Manifest(vistune_version="bench", kind="checkpoint", step=step),
            hooks=lambda total: [
                MetricsHook(opened.directory.metrics),
                TensorBoardHook(opened.directory.tensorboard),
                ConsoleHook(console, total_steps=total, live=False),
            ],
            console=console,
        )
        started = time.process_time()
        result = fit(job)
    assert result.final_loss is not None
    return [result.final_loss, started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        ratio = measure(args.folder or Path(temporary) / "tiny", Path(temporary), args)
    raise SystemExit(ratio > MAX_RATIO)


def measure(folder: Path, work: Path, args: argparse.Namespace) -> float:
    from tiny_llava import make
    from vistune.assembly import build, draw
    from vistune.data.loader import TrainData
    from vistune.models.tune import apply_tuning

    make(folder)
    resolved = recipe(
        folder, work / "run", "full", steps=args.steps, batch={"samples": 8, "max_tokens": 4096}
    )
    settings = resolved.recipe
    blueprint = draw(settings)
    model = build(blueprint, seed=0, dtype=torch.float32)
    tuning = apply_tuning(model, settings.tune, seed=0)
    groups = tuning.groups(settings.train)
    model.train()
    data = TrainData(settings.data, settings.batch, blueprint.encoder, 0)
    source = data.steps(0)
    steps = [next(source) for _ in range(args.steps)]
    start = copy.deepcopy(model.state_dict())
    times: dict[str, list[float]] = {"bare": [], "loop": []}
    for _ in range(args.repeats + 1):
        model.load_state_dict(start)
        began = time.process_time()
        last_bare = bare(model, groups, steps)[-1]
        times["bare"].append(time.process_time() - began)
        model.load_state_dict(start)
        last_loop, began = looped(model, groups, steps, resolved)
        times["loop"].append(time.process_time() - began)
    # Both end in the same place: the same arithmetic was timed.
    assert abs(last_bare - last_loop) <= 1e-5 * last_bare, (last_bare, last_loop)
    # The first turn warms up; the loop's side includes writing one checkpoint.
    milliseconds = {k: statistics.median(v[1:]) / args.steps * 1e3 for k, v in times.items()}
    pairs = zip(times["loop"][1:], times["bare"][1:], strict=True)
    ratios = sorted(loop / plain for loop, plain in pairs)
    ratio = statistics.median(ratios)
    print(
        f"{args.steps} steps of 8 samples, {args.repeats} turns: CPU time loop / bare ="
        f" {ratio:.3f} (spread {ratios[0]:.3f} to {ratios[-1]:.3f}; goal {MAX_RATIO:.2f}),"
        f" {milliseconds['loop']:.1f} / {milliseconds['bare']:.1f} ms a step"
    )
    return ratio


if __name__ == "__main__":
    main()

"""What a person reads before the first step and after the last one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.tree import Tree

from vistune.recipe import TrainConfig

if TYPE_CHECKING:
    from vistune.data.check import CheckReport
    from vistune.models.tune import Tuning
    from vistune.train.fit import TrainResult


def print_data(report: CheckReport, console: Console, *, quarantine: Path) -> None:
    """Says how much data there is and what of it is not used."""
    mean_tokens = report.num_tokens / max(1, report.num_ok)
    console.print(
        f"data: {report.num_ok:,} of {report.total_rows:,} rows usable,"
        f" {report.num_images:,} images, {report.num_tokens:,} tokens"
        f" ({report.num_image_tokens:,} of images, {report.num_target_tokens:,} targets,"
        f" {mean_tokens:.0f} a row)",
        soft_wrap=True,
        highlight=False,
    )
    if report.rejected:
        console.print(report.table(), soft_wrap=True, highlight=False, markup=False)
        console.print(f"[yellow]{len(report.rejected)} rows set aside[/], listed in {quarantine}")


def print_tuning(tuning: Tuning, train: TrainConfig, console: Console) -> None:
    """Prints what trains as a tree: role, module, mode, counts, learning rate."""
    rows = tuning.table()
    total = sum(row.num_total for row in rows if row.depth == 0)
    trained = sum(row.num_trainable for row in rows if row.depth == 0)
    tree = Tree(
        f"model: {total:,} parameters, {trained:,} train ({trained / max(1, total):.2%})",
        highlight=False,
    )
    branch = tree
    for row in rows:
        text = f"{row.module} {row.num_total:,}"
        if row.num_trainable:
            text += f", {row.num_trainable:,} train"
        if row.depth:
            branch.add(text)
            continue
        mode = row.mode
        if row.num_trainable:
            mode += f", lr {train.lr if row.lr is None else row.lr:g}"
        branch = tree.add(f"{row.role} ({mode}): {text}")
    console.print(tree)


def print_changed_engine(
    before: Mapping[str, Any], now: Mapping[str, Any], console: Console
) -> None:
    """Says where a resumed run computes in another way than it did: `auto` may choose anew.

    Args:
        before: From the record of the start before.
        now: From `set_up_engine`.
        console: Where it is said.
    """
    old, new = _engine_names(before), _engine_names(now)
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        console.print(
            f"[yellow]note:[/] computed in another way than before, numbers may differ by rounding:"
            f" {'; '.join(changed)}",
            soft_wrap=True,
            highlight=False,
        )


def _engine_names(engine: Mapping[str, Any]) -> dict[str, object]:
    """Returns what decides rounding, without the reasons, which may change by themselves."""
    attention = engine.get("attention", {})
    return {
        "attention of the language model": attention.get("language", {}).get("name"),
        "attention of the vision tower": attention.get("vision", {}).get("name"),
        "layers": engine.get("layers"),
        "kernels": engine.get("kernels", {}).get("name"),
        "compiled": engine.get("compiled"),
    }


def print_result(result: TrainResult, console: Console, *, total_steps: int) -> None:
    """Says how the run ended, and how to go on."""
    if result.interrupted_by is not None:
        console.print(
            f"[yellow]stopped by {result.interrupted_by}[/] after step {result.steps} of"
            f" {total_steps}; saved {result.checkpoint}. To go on: the same command with --resume",
            soft_wrap=True,
            highlight=False,
        )
        return
    counts = [f"{result.steps} steps"]
    if result.seconds > 0:
        counts.append(f"{result.seconds:.1f} s")
    if result.first_loss is not None and result.final_loss is not None:
        counts.append(f"loss {result.first_loss:.4f} -> {result.final_loss:.4f}")
    if result.skipped_steps:
        counts.append(f"{result.skipped_steps} steps skipped")
    if result.rejected_rows:
        counts.append(f"{result.rejected_rows} rows rejected while training")
    console.print(
        f"done: {', '.join(counts)}; checkpoint {result.checkpoint}",
        soft_wrap=True,
        highlight=False,
    )
    print_sources(result, console)
    print_speed(result, console)


def print_sources(result: TrainResult, console: Console) -> None:
    """Says what every data source of a mixture gave over the logged steps, a line each."""
    done = result.totals
    if len(done.sources) < 2 or not done.samples:
        return
    for name, source in done.sources.items():
        loss = "" if source.loss is None else f", mean loss {source.loss:.4f}"
        console.print(
            f"source {name}: {source.samples:,} samples ({source.samples / done.samples:.2%}),"
            f" {source.tokens:,} tokens, {source.target_tokens:,} learnt from{loss}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def print_speed(result: TrainResult, console: Console) -> None:
    """Says what a process achieved over its logged steps, with the maths beside the number."""
    done = result.totals
    tokens_per_s, samples_per_s = done.per_s(done.tokens), done.per_s(done.samples)
    if tokens_per_s is None or samples_per_s is None:
        return
    parts = [
        f"{tokens_per_s:,.0f} useful tokens/s ({done.tokens:,} tokens in {done.seconds:.1f} s)",
        f"{samples_per_s:.1f} samples/s",
    ]
    useful, mfu = done.useful_tflops, done.mfu(result.peak_tflops)
    if useful is not None and done.flops is not None:
        parts.append(f"{useful:.3g} useful TFLOP/s ({done.flops / 1e12:.3g} TFLOP needed)")
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%} of {result.peak_tflops:.0f} TFLOP/s measured")
    if done.data_wait_frac is not None:
        parts.append(f"data wait {done.data_wait_frac:.1%}")
    if done.padding_frac is not None:
        parts.append(f"padding {done.padding_frac:.1%}")
    if result.peak_memory_gib is not None:
        parts.append(f"peak {result.peak_memory_gib:.1f} GiB")
    console.print("speed: " + ", ".join(parts), soft_wrap=True, highlight=False)

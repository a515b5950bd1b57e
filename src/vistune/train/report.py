"""What a person reads before the first step and after the last one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
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
    """Says how the run ended, what it achieved and how to go on; every line fits 80 columns."""
    if result.interrupted_by is not None:
        _say(
            console,
            f"[yellow]stopped by {result.interrupted_by}[/] after step {result.steps} of"
            f" {total_steps}; to go on: the same command with --resume",
        )
    else:
        _say(console, f"done: {_counts(result)}")
    print_sources(result, console)
    print_speed(result, console)
    _say(console, f"checkpoint: {escape(str(result.checkpoint))}")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _counts(result: TrainResult) -> str:
    counts = [f"{result.steps} steps"]
    if result.seconds > 0:
        counts.append(_seconds(result.seconds))
    if result.first_loss is not None and result.final_loss is not None:
        counts.append(f"loss {result.first_loss:.4f} -> {result.final_loss:.4f}")
    if result.skipped_steps:
        counts.append(f"{result.skipped_steps} steps skipped")
    if result.rejected_rows:
        counts.append(f"{result.rejected_rows} rows rejected while training")
    return ", ".join(counts)


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
    _say(
        console,
        f"speed: {tokens_per_s:,.0f} useful tokens/s, {samples_per_s:,.1f} samples/s"
        f" ({done.tokens:,} tokens in {_seconds(done.seconds)})",
    )
    useful, mfu = done.useful_tflops, done.mfu(result.peak_tflops)
    if useful is not None and done.flops is not None:
        share = "" if mfu is None else f", MFU {mfu:.1%} of {result.peak_tflops:.3g} measured"
        _say(
            console, f"compute: {useful:.3g} useful TFLOP/s ({done.flops / 1e12:.3g} TFLOP){share}"
        )
    lost = []
    if done.data_wait_frac is not None:
        lost.append(f"data wait {done.data_wait_frac:.1%}")
    if done.padding_frac is not None:
        lost.append(f"padding {done.padding_frac:.1%}")
    _say(console, f"lost to: {', '.join(lost)}")
    if result.peak_memory_gib is not None:
        _say(console, f"memory: peak {result.peak_memory_gib:.1f} GiB")

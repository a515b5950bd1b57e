"""The two stages of LLaVA-1.5 at real size: vistune's own training command against the baselines.

    python bench/h200/engine.py FOLDER --rows stage1-bf16,stage1-fp8,... [--size 7b] [--steps 8]

FOLDER is what make.py wrote. Each row runs in a process of its own and prints one line of JSON;
vistune's rows are ordinary `vistune.train` runs (data layer, checkpoints and metrics on), read off
their metrics.jsonl; the baselines are the loops described in bench/README.md. `stage2-full` trains
the whole language model; its process ends at the last measured step, before the run would write its
checkpoint, which with the optimizer's state is 75 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARMUP_STEPS = 3

VISTUNE_ROWS = ("stage1-bf16", "stage1-fp8", "stage2-bf16", "stage2-fp8", "stage2-full")
BASELINES = {
    "stage1-as-shipped": "stage1-bf16",
    "stage2-common-default": "stage2-bf16",
    "stage2-full-padded": "stage2-full",
}
"""Baselines, and the row of the same work."""


def recipe(folder: Path, row: str, size: str, steps: int) -> dict[str, Any]:
    """Returns the recipe of a vistune row, as a mapping."""
    first = row.startswith("stage1")
    tune: dict[str, Any] = {"connector": {"mode": "full"}, "language": {"mode": "freeze"}}
    if row.endswith("full"):
        tune["language"] = tune["head"] = {"mode": "full", "lr": 2e-5}
        tune["connector"]["lr"] = 2e-5
    elif not first:
        tune["language"] = {"mode": "lora", "rank": 128, "alpha": 256, "lr": 2e-4}
    if row.endswith("fp8"):
        tune["language"]["frozen_format"] = "fp8"
    return {
        "name": row,
        "run_dir": str(folder / "runs" / row),
        "model": {
            "vision_tower": {"path": str(folder / "tower"), "layer": -2},
            "language_model": {"path": str(folder / f"llm-{size}")},
        },
        "tune": tune,
        "data": {
            "train": [
                {
                    "path": str(folder / ("stage1.json" if first else "stage2.json")),
                    "images": str(folder / "images"),
                }
            ],
            "template": "plain" if first else "vicuna_v1",
            "image": {"mode": "crop" if first else "pad"},
            "overlong": "truncate_text",
            "workers": 8,
        },
        "batch": {"max_tokens": 20480 if first else 16384, "samples": 32 if first else 16},
        "train": {"steps": steps, "lr": 1e-3},
        "log": {"progress": False},
    }


@contextmanager
def profiled(on: bool) -> Iterator[None]:
    """Prints where the device's time went, by kernel."""
    if not on:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
    rows = [(e.device_time_total, e.count, e.key) for e in seen.key_averages()]
    total_us = sum(time_us for time_us, _, _ in rows)
    for time_us, count, key in sorted(rows, reverse=True)[:30]:
        print(f"{time_us / total_us:6.1%} {time_us / 1e3:9.1f} ms {count:6d} x {key[:90]}")


def run_vistune(
    folder: Path, row: str, size: str, steps: int, overrides: list[str], *, profile: bool
) -> None:
    """Runs one row by the public interface and prints its line."""
    import yaml

    from vistune.recipe import load_recipe
    from vistune.train import train

    file = folder / f"{row}.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, row, size, steps)))
    metrics = folder / "runs" / row / "metrics.jsonl"
    if row.endswith("full"):
        metrics.unlink(missing_ok=True)
        threading.Thread(target=end_at, args=(metrics, row, steps - 1), daemon=True).start()
    with profiled(profile):
        train(load_recipe(str(file), overrides), overwrite=True)
    report(row, metrics)


def end_at(metrics: Path, row: str, steps: int) -> None:
    """Waits for a step of the run in this process, reports, and ends the process."""
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < steps:
        time.sleep(0.2)
    report(row, metrics)
    sys.stdout.flush()
    for worker in multiprocessing.active_children():  # they would hold the device's memory
        worker.kill()
        worker.join()
    os._exit(0)


def report(row: str, metrics: Path) -> None:
    """Prints a row from the lines of a run's metrics."""
    kept = [json.loads(line) for line in metrics.read_text().splitlines()][WARMUP_STEPS:]
    total_s = sum(k["step_s"] for k in kept)

    def mean(key: str) -> float | None:
        values = [k[key] for k in kept]
        if None in values:
            return None
        return sum(v * k["step_s"] for v, k in zip(values, kept, strict=True)) / total_s

    print_row(
        row,
        samples_per_s=sum(k["samples"] for k in kept) / total_s,
        tokens_per_s=sum(k["tokens"] for k in kept) / total_s,
        useful_tflops=mean("useful_tflops"),
        mfu=mean("mfu"),
        step_s=statistics.median(k["step_s"] for k in kept),
        wait=sum(k["data_wait_s"] for k in kept) / total_s,
        peak_gib=kept[-1]["peak_memory_gib"],
    )


def print_row(row: str, **figures: float | None) -> None:
    """Prints one line of JSON."""
    rounded = {k: None if v is None else round(v, 3) for k, v in figures.items()}
    print("ROW " + json.dumps({"row": row, **rounded}))


def cost_of(folder: Path, row: str, size: str) -> Any:
    """Returns what counts the useful operations of rows of a vistune row's work."""
    import torch
    import yaml

    from vistune.models.facts import describe
    from vistune.models.flops import row_flops, work_of
    from vistune.models.memory import skeleton
    from vistune.models.tune import apply_tuning
    from vistune.recipe import load_recipe

    file = folder / f"{row}-cost.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, row, size, 1)))
    loaded = load_recipe(str(file)).recipe
    with torch.device("meta"):
        model = skeleton(loaded.model, describe(loaded.model))
        apply_tuning(model, loaded.tune, seed=0)
    work = work_of(model, loaded.tune)
    assert work is not None
    return lambda lengths: row_flops(work, lengths).total


def padded_model(folder: Path, row: str, size: str) -> tuple[Any, list[Any]]:
    """Returns transformers' LLaVA as a baseline trains it, and its trained parameters."""
    import torch
    from make import text_config
    from transformers import CLIPVisionConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    full = row == "stage2-full-padded"
    vision = CLIPVisionConfig.from_pretrained(folder / "tower")
    text = text_config(size, vocab_size=32064)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    torch.set_default_dtype(torch.float32 if full else torch.bfloat16)
    with torch.device("cuda"):
        model = Llava(config)
    model.requires_grad_(full)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if row == "stage2-common-default":
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=128, lora_alpha=256, target_modules=r".*language_model.*_proj")
        inject_adapter_in_model(lora, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def run_baseline(folder: Path, row: str, size: str, steps: int) -> None:
    """Padded rows, full activation checkpointing, logits everywhere: the common default.

    The full fine-tune keeps fp32 weights and AdamW state and computes under bf16 autocast, as ours
    does; its 16 samples go through in four micro-batches, without which it does not fit.
    """
    import numpy as np
    import torch
    from make import clipped_lognormal

    from vistune.device import select_device
    from vistune.device.peak import measure_matmul_tflops
    from vistune.models.flops import RowLengths

    first, full = row.startswith("stage1"), row == "stage2-full-padded"
    rng = np.random.default_rng(0)
    batch, parts = (32, 1) if first else (16, 4 if full else 1)
    shape = (22, 0.5, 6, 120) if first else (170, 0.85, 16, 1400)
    lengths = clipped_lognormal(rng, *shape, n=batch * (steps + WARMUP_STEPS))
    peak = measure_matmul_tflops(select_device("cuda", "bf16"))
    cost = cost_of(folder, BASELINES[row], size)
    model, trained = padded_model(folder, row, size)
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if full else 1e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    times, tokens, flops = [], [], 0
    for step in range(steps + WARMUP_STEPS):
        part = lengths[step * batch : (step + 1) * batch]
        cuts = [part[i :: batch // parts] for i in range(batch // parts)] if full else [part]
        made = [padded_batch(cut, first=first) for cut in cuts]
        torch.cuda.synchronize()
        started = time.perf_counter()
        for inputs in made:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=full):
                loss = model(**inputs).loss / len(made)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step < WARMUP_STEPS:
            continue
        times.append(time.perf_counter() - started)
        tokens.append(576 * batch + sum(part))
        targets = sum(n - 1 - (0 if first else int(0.4 * n)) for n in part)
        flops += cost(RowLengths([576 + n for n in part], targets, batch, 576 * batch))
    useful = flops / sum(times) / 1e12
    print_row(
        row,
        samples_per_s=batch * len(times) / sum(times),
        tokens_per_s=sum(tokens) / sum(times),
        useful_tflops=useful,
        mfu=None if peak is None else useful / peak,
        step_s=statistics.median(times),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
    )


def padded_batch(lengths: list[int], *, first: bool) -> dict[str, Any]:
    """Returns one padded batch: an image and some text each, drawn on the device."""
    import torch

    batch, widest = len(lengths), 576 + max(lengths)
    ids = torch.full((batch, widest), 5, device="cuda")
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, n in enumerate(lengths):
        ids[i, 1:577] = 32000
        mask[i, : 576 + n] = 1
        labels[i, 577 + (0 if first else int(0.4 * n)) : 576 + n] = 5
    pixels = torch.randn(batch, 3, 336, 336, device="cuda")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=",".join((*BASELINES, *VISTUNE_ROWS)))
    parser.add_argument("--size", default="7b")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--profile", action="store_true", help="with --alone: device time by kernel"
    )
    parser.add_argument("--alone", action="store_true", help="run the one row in this process")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if not args.alone:
        for row in rows:
            command = [sys.executable, __file__, str(args.folder), "--rows", row, "--alone"]
            command += ["--size", args.size, "--steps", str(args.steps), "--set", *args.overrides]
            subprocess.run(command, check=False)
        return
    if rows[0] in BASELINES:
        run_baseline(args.folder, rows[0], args.size, args.steps)
    else:
        steps = args.steps + WARMUP_STEPS
        run_vistune(args.folder, rows[0], args.size, steps, args.overrides, profile=args.profile)


if __name__ == "__main__":
    main()

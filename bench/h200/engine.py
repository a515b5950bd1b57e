"""The two stages of LLaVA-1.5 at real size: vistune's own training command against the baselines.

    python bench/h200/engine.py FOLDER --rows stage1-bf16,stage1-fp8,... [--size 7b] [--steps 8]

FOLDER is what make.py wrote. Each row runs in a process of its own and prints one line of JSON;
vistune's rows are ordinary `vistune.train` runs (data layer, checkpoints and metrics on), read off
their metrics.jsonl; the baselines are the loops described in bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARMUP_STEPS = 3

VISTUNE_ROWS = ("stage1-bf16", "stage1-fp8", "stage2-bf16", "stage2-fp8")
BASELINES = ("stage1-as-shipped", "stage2-common-default")


def recipe(folder: Path, row: str, size: str, steps: int) -> dict[str, Any]:
    """Returns the recipe of a vistune row, as a mapping."""
    first = row.startswith("stage1")
    language: dict[str, Any] = {"mode": "freeze"}
    if not first:
        language = {"mode": "lora", "rank": 128, "alpha": 256, "lr": 2e-4}
    if row.endswith("fp8"):
        language["frozen_format"] = "fp8"
    return {
        "name": row,
        "run_dir": str(folder / "runs" / row),
        "model": {
            "vision_tower": {"path": str(folder / "tower"), "layer": -2},
            "language_model": {"path": str(folder / f"llm-{size}")},
        },
        "tune": {"connector": {"mode": "full"}, "language": language},
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
    with profiled(profile):
        train(load_recipe(str(file), overrides), overwrite=True)
    lines = (folder / "runs" / row / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines][WARMUP_STEPS:]
    seconds = statistics.median(k["step_s"] for k in kept)
    total_s = sum(k["step_s"] for k in kept)
    print_row(
        row,
        samples_per_s=sum(k["samples"] for k in kept) / total_s,
        tokens_per_s=sum(k["tokens"] for k in kept) / total_s,
        step_s=seconds,
        wait=sum(k["data_wait_s"] for k in kept) / total_s,
        peak_gib=kept[-1]["peak_memory_gib"],
    )


def print_row(row: str, **figures: float | None) -> None:
    """Prints one line of JSON."""
    rounded = {k: None if v is None else round(v, 3) for k, v in figures.items()}
    print("ROW " + json.dumps({"row": row, **rounded}))


def run_baseline(folder: Path, row: str, size: str, steps: int) -> None:
    """Padded rows, full activation checkpointing, logits everywhere: the common default."""
    import numpy as np
    import torch
    from make import SIZES, clipped_lognormal
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    first = row.startswith("stage1")
    rng = np.random.default_rng(0)
    batch = 32 if first else 16
    shape = (22, 0.5, 6, 120) if first else (170, 0.85, 16, 1400)
    lengths = clipped_lognormal(rng, *shape, n=batch * (steps + WARMUP_STEPS))
    vision = CLIPVisionConfig.from_pretrained(folder / "tower")
    heads = {"7b": 32, "13b": 40}[size]
    text = LlamaConfig(**SIZES[size], num_attention_heads=heads, vocab_size=32064)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Llava(config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if not first:
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=128, lora_alpha=256, target_modules=r".*language_model.*_proj")
        inject_adapter_in_model(lora, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    times, tokens = [], []
    for step in range(steps + WARMUP_STEPS):
        part = lengths[step * batch : (step + 1) * batch]
        widest = 576 + max(part)
        ids = torch.full((batch, widest), 5, device="cuda")
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, n in enumerate(part):
            ids[i, 1:577] = 32000
            mask[i, : 576 + n] = 1
            labels[i, 577 + (0 if first else int(0.4 * n)) : 576 + n] = 5
        pixels = torch.randn(batch, 3, 336, 336, device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= WARMUP_STEPS:
            times.append(time.perf_counter() - started)
            tokens.append(576 * batch + sum(part))
    print_row(
        row,
        samples_per_s=batch * len(times) / sum(times),
        tokens_per_s=sum(tokens) / sum(times),
        step_s=statistics.median(times),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
    )


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

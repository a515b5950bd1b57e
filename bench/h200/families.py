"""Model families at their real size: time of a step and peak memory, predicted and measured.

    python bench/h200/families.py FOLDER --tokenizer DIR [--rows mgm-stage1,...] [--steps 8]

Weights are random; nothing is downloaded. MGM-2B's rows are ordinary `vistune.train` runs from a
model directory in MGM's public layout, which is written into FOLDER first, beside make.py's images
and texts; their baseline computes as MGM is shipped (see `as_shipped`). CogVLM2 and VisualGLM are
built on the device and run the functions of a training step on a drawn row, as plan_grid.py does.
Each row runs in a process of its own and prints one line of JSON. `--tiny` shrinks every model, to
try the script on a CPU; nothing is measured there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make import clipped_lognormal, make_data
from plan_grid import run_steps

from vistune.data.collate import pack_row
from vistune.models.facts import ModelFacts
from vistune.models.memory import RowSize, memory_model
from vistune.models.probes import family_skeleton
from vistune.models.tune import apply_tuning
from vistune.recipe import ModelConfig, TrainConfig, TuneConfig, load_recipe
from vistune.types import Batch, EncodedSample

WARMUP_STEPS = 3
GIB = 2**30
LORA = {"mode": "lora", "rank": 8, "alpha": 32}
MGM_TUNE: dict[str, Any] = {
    "mgm-stage1": {"connector": {"mode": "full"}},
    "mgm-stage2": {"connector": {"mode": "full"}, "language": {"mode": "full", "lr": 2e-5}},
}
DRAWN = {
    # name: family, samples, text tokens of each, layers computed again
    "cogvlm2-lora": ("cogvlm2", 1, 512, 0),
    "cogvlm2-lora-recomputed": ("cogvlm2", 4, 512, 32),
    "visualglm-lora": ("visualglm", 16, 300, 0),
}
ROWS = ("mgm-stage1-as-shipped", *MGM_TUNE, *DRAWN)


def mgm_config(*, tiny: bool) -> Any:
    """Returns MGM-2B's config: CLIP-L/14 at 336, ConvNeXt-L at 768, Gemma-2B."""
    from transformers import CLIPVisionConfig, GemmaConfig

    from vistune.models.mgm import MGMConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    text = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    widths, depths, aux = (192, 384, 768, 1536), (3, 3, 27, 3), 768
    if tiny:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 4, "image_size": 56}
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        widths, depths, aux = (8, 16, 24, 32), (1, 1, 1, 1), 128
    vocabulary = 32_001 if tiny else 256_000
    return MGMConfig(
        vision_config=CLIPVisionConfig(**vision),
        # Ids of the begin and end of text as in the tokenizer that stands in for Gemma's.
        text_config=GemmaConfig(
            **text, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        aux_widths=list(widths),
        aux_depths=list(depths),
        image_size_aux=aux,
        image_token_id=vocabulary,
    )


def family_config(family: str, *, tiny: bool) -> Any:
    """Returns the public config of CogVLM2-19B or VisualGLM-6B."""
    from vistune.models.cogvlm2 import CogVLM2Config
    from vistune.models.visualglm import VisualGLMConfig

    if family == "cogvlm2":
        if not tiny:
            return CogVLM2Config()
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        small |= {"num_heads": 2, "image_size": 56, "num_positions": 17}
        return CogVLM2Config(
            small, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_multi_query_heads=2,
        )  # fmt: skip
    if not tiny:
        return VisualGLMConfig()
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    eye = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 56}
    former = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    former |= {"num_attention_heads": 4, "encoder_hidden_size": 32}
    return VisualGLMConfig(
        text_config=text | {"num_attention_heads": 4},
        vision_config=eye | {"num_attention_heads": 4},
        qformer_config=former,
    )


def facts_of(config: Any) -> ModelFacts:
    """Returns what the planner is told of a family's model."""
    with torch.device("meta"):
        grid = family_skeleton(config).grid
    text = getattr(config, "text_config", config)
    return ModelFacts(None, 0, grid, None, None, text, None, whole_config=config)  # type: ignore[arg-type]


def build(
    config: Any, device: torch.device, dtype: torch.dtype, *, make: Any = family_skeleton
) -> Any:
    """Builds a model of random numbers on a device."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = make(config)
    torch.set_default_dtype(torch.float32)
    return model


def draw_row(config: Any, num_samples: int, num_text: int, facts: ModelFacts) -> Batch:
    """Returns a row of samples of one image each; half of the text is learnt."""
    side = int(facts.grid.fixed_size_px or 0)
    num_image = facts.grid.num_tokens(side, side)
    answer = num_text // 2
    ids = np.full(num_image + num_text, 9)
    image = config.image_token_id
    ids[1 : 1 + num_image] = image
    if hasattr(config, "qformer_config"):
        # VisualGLM's prompt ends with its mask token and the begin of the answer.
        marks = config.text_config
        ids[-answer - 2 : -answer] = [marks.gmask_token_id, marks.bos_token_id]
    mask = np.arange(len(ids)) >= len(ids) - answer
    pixels = np.random.default_rng(0).standard_normal((3, side, side), dtype=np.float32)
    samples = [
        EncodedSample(
            id=str(number), source="s", input_ids=ids, target_mask=mask,
            pixel_values=[pixels], num_image_tokens=num_image,
        )
        for number in range(num_samples)
    ]  # fmt: skip
    return pack_row(samples)


def run_drawn(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Predicts and measures LoRA on the language model of a family; its towers stay frozen."""
    family, num_samples, num_text, layers = DRAWN[name]
    device, dtype = target(tiny=args.tiny)
    config = family_config(family, tiny=args.tiny)
    facts = facts_of(config)
    layers = min(layers, int(facts.text_config.num_hidden_layers))
    experts = {"targets": ["vision_expert_query_key_value"]}
    language = LORA | (experts if family == "cogvlm2" else {})
    tune = TuneConfig.model_validate({"connector": {"mode": "freeze"}, "language": language})
    train = TrainConfig(steps=args.steps)
    row = draw_row(config, num_samples, num_text, facts)
    memory = memory_model(
        ModelConfig.model_construct(), facts, tune=tune, train=train, dtype=dtype, fused=True
    )
    size = RowSize(row.num_tokens, row.num_samples, row.num_targets, row.num_tokens)
    predicted = memory.predict(size, checkpoint_layers=layers)
    model = build(config, device, dtype)
    with device:
        tuning = apply_tuning(model, tune, seed=0)
    step_s = run_steps(
        model, tuning, row, train=train, num_recomputed=layers, device=device, dtype=dtype,
        num_steps=args.steps,
    )  # fmt: skip
    return {
        "tokens": row.num_tokens,
        "images": row.num_samples,
        "recomputed": layers,
        "trained": tuning.num_trainable,
        "step_s": step_s,
        "tokens_per_s": row.num_tokens / step_s,
        **against_measured(predicted.peak_gib, device),
    }


def against_measured(predicted_gib: float, device: torch.device) -> dict[str, float]:
    """Returns predicted and measured peak, and the error of the first."""
    found = {"predicted_gib": predicted_gib}
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated() / GIB
        found |= {"measured_gib": measured, "error": predicted_gib / measured - 1}
    return found


def target(*, tiny: bool) -> tuple[torch.device, torch.dtype]:
    """Returns where to run, and in which format."""
    if tiny:
        return torch.device("cpu"), torch.float32
    return torch.device("cuda"), torch.bfloat16


def make_mgm(folder: Path, tokenizer: Path, *, tiny: bool) -> None:
    """Writes MGM-2B in its public layout, and the images and texts of make.py."""
    from vistune.checkpoint.layouts.mgm import write_mgm

    if not (folder / "stage2.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder)
    if (folder / "mgm" / "tokenizer.json").is_file():
        return
    device, dtype = target(tiny=tiny)
    model = build(mgm_config(tiny=tiny), device, dtype)
    write_mgm(model, folder / "mgm", dtype=dtype)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / "mgm" / file.name)


def mgm_recipe(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the recipe of an MGM row, as a mapping."""
    first = name == "mgm-stage1"
    return {
        "name": name,
        "device": "cpu" if args.tiny else "cuda",
        "run_dir": str(folder / "runs" / name),
        "model": {"from_checkpoint": str(folder / "mgm")},
        "tune": MGM_TUNE[name],
        "data": {
            "train": [
                {
                    "path": str(folder / ("stage1.json" if first else "stage2.json")),
                    "images": str(folder / "images"),
                }
            ],
            "template": "plain" if first else "vicuna_v1",
            "overlong": "truncate_text",
            "workers": 2 if args.tiny else 12,
        },
        "batch": {
            "max_tokens": 20480 if first else 16384,
            "samples": (2 if args.tiny else 32) if first else (2 if args.tiny else 16),
        },
        "train": {"steps": args.steps + WARMUP_STEPS, "lr": 1e-3},
        "log": {"progress": False},
    }


def run_mgm(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains by the public interface; the figures are those of its metrics.jsonl."""
    import yaml

    from vistune.plan import make_plan
    from vistune.train import train

    file = args.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(mgm_recipe(args.folder, name, args)))
    recipe = load_recipe(str(file), args.overrides)
    plan = make_plan(recipe.recipe, device="h200", read_data=True)
    train(recipe, overwrite=True)
    lines = (args.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines][WARMUP_STEPS:]
    total_s = sum(k["step_s"] for k in kept)
    found = {
        "samples_per_s": sum(k["samples"] for k in kept) / total_s,
        "tokens_per_s": sum(k["tokens"] for k in kept) / total_s,
        "step_s": statistics.median(k["step_s"] for k in kept),
        "wait": sum(k["data_wait_s"] for k in kept) / total_s,
        "longest_row": plan.row.num_tokens,
        "predicted_gib": plan.prediction.peak_gib,
    }
    if kept[-1]["peak_memory_gib"] is not None:
        measured = kept[-1]["peak_memory_gib"]
        found |= {"measured_gib": measured, "error": plan.prediction.peak_gib / measured - 1}
    return found


def as_shipped(args: argparse.Namespace) -> dict[str, Any]:
    """Stage 1 as public MGM computes it, over the same modules as ours.

    Four micro-batches of 8 padded rows, every decoder layer computed again, logits at every
    position in fp32, both towers run without gradients; see `mgm_shipped` for the pictures.
    """
    from mgm_shipped import ShippedMGM

    device, dtype = target(tiny=args.tiny)
    config = mgm_config(tiny=args.tiny)
    model = build(config, device, dtype, make=ShippedMGM)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.connector.float()
    decoder = model.language_model
    decoder.set_attn_implementation("sdpa")
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    decoder.train()
    trained = list(model.connector.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=device.type == "cuda")
    micro, accumulated, side = (2, 1, config.image_size_aux) if args.tiny else (8, 4, 768)
    num_image = facts_of(config).grid.num_tokens(side, side)
    rng = np.random.default_rng(0)
    num_steps = args.steps + WARMUP_STEPS
    lengths = clipped_lognormal(rng, 22, 0.5, 6, 120, n=micro * accumulated * num_steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, tokens = [], 0
    for step in range(num_steps):
        parts = []
        for _ in range(accumulated):
            part = [lengths.pop() for _ in range(micro)]
            parts.append((padded(part, num_image, config.image_token_id, device), part))
        pixels = torch.randn(micro, 3, side, side, device=device)
        synchronize(device)
        started_s = time.perf_counter()
        for (ids, mask, labels), _ in parts:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
            logits = logits.float()[:, :-1].contiguous().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            (loss / accumulated).backward()
            del logits, loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if step >= WARMUP_STEPS:
            times.append(time.perf_counter() - started_s)
            tokens += sum(num_image + n for _, part in parts for n in part)
    found = {
        "samples_per_s": micro * accumulated * len(times) / sum(times),
        "tokens_per_s": tokens / sum(times),
        "step_s": statistics.median(times),
    }
    if device.type == "cuda":
        found["measured_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def padded(lengths: list[int], num_image: int, image_id: int, device: torch.device) -> Any:
    """Returns ids, mask and labels of a padded micro-batch."""
    ids = torch.full((len(lengths), num_image + max(lengths)), 5)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    ids[:, 1 : 1 + num_image] = image_id
    for i, n in enumerate(lengths):
        mask[i, : num_image + n] = 1
        labels[i, num_image + 1 : num_image + n] = 5
    return ids.to(device), mask.to(device), labels.to(device)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one row in this process."""
    if name in DRAWN:
        return run_drawn(name, args)
    if name == "mgm-stage1-as-shipped":
        return as_shipped(args)
    make_mgm(args.folder, args.tokenizer, tiny=args.tiny)
    return run_mgm(name, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--alone", action="store_true", help="run the one row in this process")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if args.alone:
        found = run(rows[0], args)
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print("ROW " + json.dumps({"row": rows[0], **rounded}))
        return
    for row in rows:
        command = [sys.executable, __file__, str(args.folder), "--rows", row, "--alone"]
        command += ["--tokenizer", str(args.tokenizer), "--steps", str(args.steps)]
        command += ["--tiny"] * args.tiny + ["--set", *args.overrides]
        subprocess.run(command, check=False)


if __name__ == "__main__":
    main()

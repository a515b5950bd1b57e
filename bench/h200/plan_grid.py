"""Predicted and measured peak memory over a grid of models, tuning modes and row lengths.

    python bench/h200/plan_grid.py [--limit-s 300] [--only SUBSTRING] [--tiny]

Every configuration builds its model of random numbers on the device (nothing is read or written),
runs four optimizer steps on one drawn row through the functions that training runs (`LossModule`,
`backward_step`, the optimizer, fused layers where the recipe would have them), and prints predicted
and measured peak, and the tokens a second of the fastest step. Configurations that need
bitsandbytes are left out, and said, where it is not installed. `--tiny` shrinks every model, to try
the script on a CPU (nothing is measured there).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vistune.data.collate import pack_row
from vistune.errors import VistuneError
from vistune.models.budget import usable_bytes
from vistune.models.facts import ModelFacts
from vistune.models.fused.install import fused_trunk, install_fused
from vistune.models.memory import RowSize, memory_model, skeleton
from vistune.models.modes import let_layers_recompute, set_training_mode
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.towers.families import plan_tower, tower_grid
from vistune.models.tune import Tuning, apply_tuning
from vistune.models.tune.quantize import quantize_frozen
from vistune.parallel import SingleProcess
from vistune.recipe import ConnectorConfig, ModelConfig, TrainConfig, TuneConfig
from vistune.train.optim import build_optimizer
from vistune.train.step import LossModule, StepSums, backward_step
from vistune.types import EncodedSample, ImageDefaults

SIZES: dict[str, dict[str, int]] = {
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "3b": {
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}


@dataclass(frozen=True)
class Case:
    """One configuration: size, mode of the language model, tokens of the row, and the rest."""

    size: str
    mode: str
    tokens: int
    layers: int = 0
    optimizer: str = "adamw"
    vision: str = "freeze"

    @property
    def name(self) -> str:
        extra = f" recompute {self.layers}" if self.layers else ""
        extra += " 8-bit AdamW" if self.optimizer != "adamw" else ""
        extra += " tower full" if self.vision == "full" else ""
        return f"{self.size} {self.mode} {self.tokens}{extra}"

    @property
    def tune(self) -> TuneConfig:
        lora = {"mode": "lora", "rank": 64, "alpha": 128}
        language = {
            "frozen": {"mode": "freeze"},
            "frozen-fp8": {"mode": "freeze", "frozen_format": "fp8"},
            "lora": lora,
            "lora-fp8": {**lora, "frozen_format": "fp8"},
            "qlora-nf4": {**lora, "frozen_format": "nf4"},
            "qlora-int8": {**lora, "frozen_format": "int8"},
            "full": {"mode": "full"},
        }[self.mode]
        head = {"mode": "full" if self.mode == "full" else "freeze"}
        return TuneConfig.model_validate(
            {"language": language, "head": head, "vision": {"mode": self.vision}}
        )


GRID = (
    Case("0.5b", "frozen", 32768),
    Case("0.5b", "lora", 16384),
    Case("0.5b", "full", 16384),
    Case("0.5b", "full", 8192, vision="full"),
    Case("1.1b", "lora", 16384),
    Case("1.1b", "full", 8192),
    Case("1.1b", "full", 16384, layers=11),
    Case("3b", "frozen", 16384),
    Case("3b", "lora-fp8", 8192),
    Case("3b", "full", 4096),
    Case("3b", "full", 16384, layers=26),
    Case("7b", "frozen", 19456),
    Case("7b", "frozen-fp8", 8192),
    Case("7b", "lora", 12288),
    Case("7b", "lora", 16384, layers=16),
    Case("13b", "frozen", 19456, layers=40),
    Case("13b", "lora", 8192),
    Case("1.1b", "qlora-nf4", 8192),
    Case("7b", "qlora-nf4", 4096),
    Case("7b", "qlora-int8", 4096, optimizer="adamw_8bit"),
    Case("13b", "qlora-nf4", 8192, layers=40),
)


def facts_of(case: Case, *, tiny: bool) -> ModelFacts:
    """Describes a Llama of the case's size behind CLIP-L/14 at 336 px."""
    from transformers import CLIPVisionConfig, LlamaConfig

    shape = dict(SIZES[case.size])
    vision_shape: dict[str, int] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        shape["num_hidden_layers"] = 3
        vision_shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        vision_shape |= {"image_size": 56}
    vision = CLIPVisionConfig(**vision_shape)
    plan, cut = plan_tower(vision, layer=-2, select="patch", where="bench")
    grid = tower_grid(cut, plan, pixel_shuffle=1, where="bench")
    text = LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=4096)
    grey = ImageDefaults(int(vision.image_size), (0.5,) * 3, (0.5,) * 3, "bicubic")
    return ModelFacts(None, 32000, grid, grey, cut, text, plan)


def draw_row(num_tokens: int, facts: ModelFacts) -> Any:
    """Fills a row with samples of one image, 20 tokens of question and 28 of answer."""
    side = facts.vision_config.image_size
    num_image = facts.grid.num_tokens(side, side)
    each = num_image + 48
    samples = []
    for number in range(max(1, num_tokens // each)):
        ids = np.full(each, 5)
        ids[1 : 1 + num_image] = facts.image_token_id
        samples.append(
            EncodedSample(
                id=str(number),
                source="s",
                input_ids=ids,
                target_mask=np.arange(each) >= each - 28,
                pixel_values=[torch.randn(3, side, side).numpy()],
                num_image_tokens=num_image,
            )
        )
    return pack_row(samples)


def run(case: Case, *, device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, Any]:
    """Predicts and measures one configuration."""
    facts = facts_of(case, tiny=tiny)
    parts = ModelConfig.model_construct(connector=ConnectorConfig())
    layers = min(case.layers, facts.text_config.num_hidden_layers)
    train = TrainConfig.model_validate({"steps": 2, "optimizer": case.optimizer})
    started_s = time.perf_counter()
    memory = memory_model(
        parts, facts, tune=case.tune, train=train, dtype=dtype, fused=device.type == "cuda"
    )
    planning_s = time.perf_counter() - started_s
    row = draw_row(case.tokens if not tiny else 300, facts)
    size = RowSize(
        num_tokens=row.num_tokens,
        num_images=row.num_samples,
        num_targets=row.num_targets,
        num_tail_tokens=row.num_targets,
    )
    predicted = memory.predict(size, checkpoint_layers=layers)
    found: dict[str, Any] = {
        "case": case.name,
        "tokens": row.num_tokens,
        "predicted_gib": round(predicted.peak_gib, 3),
        "planning_s": round(planning_s, 2),
    }
    if device.type == "cuda" and predicted.peak > usable_bytes(
        torch.cuda.mem_get_info()[1] / 2**30
    ):
        return found | {"note": "predicted not to fit, not run"}
    # Built off the measured device only where storage is needed: the weights are drawn on it.
    with torch.device("meta"):
        model = skeleton(parts, facts).to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for module in model.modules():  # tables that loading would have computed
        if hasattr(module, "inv_freq"):
            width = 2 * module.inv_freq.numel()
            steps = torch.arange(0, width, 2, device=device).float() / width
            module.inv_freq = 10000.0**-steps
        if hasattr(module, "position_ids"):
            module.position_ids.copy_(torch.arange(module.position_ids.numel())[None])
    with torch.device(device):
        tuning = apply_tuning(model, case.tune, seed=0)
    step_s = run_steps(
        model, tuning, row, train=train, num_recomputed=layers, device=device, dtype=dtype
    )
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated() / 2**30
        found["measured_gib"] = round(measured, 3)
        found["error"] = round(predicted.peak_gib / measured - 1, 4)
        found["tokens_per_s"] = round(row.num_tokens / step_s)
    return found


def run_steps(
    model: Any,
    tuning: Tuning,
    row: Any,
    *,
    train: TrainConfig,
    num_recomputed: int,
    device: torch.device,
    dtype: torch.dtype,
    num_steps: int = 4,
) -> float:
    """Runs optimizer steps on one row and returns the shortest one's time in seconds.

    Args:
        model: On its device, adapters in place.
        tuning: What trains.
        row: The row, on the CPU.
        train: Optimizer.
        num_recomputed: Layers computed again.
        device: Where the model is; peak memory is counted from here on.
        dtype: Format of frozen weights.
        num_steps: How many.
    """
    tune, language = tuning.tune, tuning.tune.language
    frozen_format = "same" if language.mode == "full" else language.frozen_format
    if frozen_format in ("int8", "nf4"):
        quantize_frozen(model, "language", frozen_format, dtype=dtype, device=device)
    set_training_mode(model, tune, model.module_map)
    set_checkpoint_layers(model, num_recomputed)
    let_layers_recompute(model)
    fp8 = frozen_format == "fp8"
    print(install_fused(model, mode="auto", fp8=fp8, num_recomputed=num_recomputed))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, _ = timed_steps(
        model, tuning, [row], train=train, device=device, dtype=dtype, num_steps=num_steps,
        reads_tail=fused_trunk(model) is not None,
    )  # fmt: skip
    return min(times)


def timed_steps(
    model: Any,
    tuning: Tuning,
    rows: Sequence[Any],
    *,
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_steps: int,
    reads_tail: bool = False,
) -> tuple[list[float], StepSums]:
    """Runs optimizer steps of a model that is set up to train, on one row each, in turn.

    Returns:
        Each step's time in seconds, and the sums of the last one.
    """
    strategy = SingleProcess()
    module = strategy.prepare(
        LossModule(model, sources=("s",), vocabulary_size=vocabulary_of(model)),
        lambda _: build_optimizer(model.named_parameters(), tuning.groups(train), train),
    )
    times = []
    for number in range(num_steps):
        started_s = time.perf_counter()
        sums = backward_step(
            strategy,
            module,
            [rows[number % len(rows)]],
            sources=("s",),
            device=device,
            autocast_dtype=torch.bfloat16 if dtype is torch.bfloat16 else None,
            clip_norm=1.0,
            reads_tail=reads_tail,
        )
        strategy.step(lr_factor=1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return times, sums


def vocabulary_of(model: Any) -> int:
    """Returns the width of a model's logits."""
    return int(model.config.get_text_config().vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-s", type=float, default=300.0, help="start no case after this")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    has_bits = importlib.util.find_spec("bitsandbytes") is not None
    started_s, found = time.perf_counter(), []
    for case in GRID:
        if args.only not in case.name:
            continue
        if time.perf_counter() - started_s > args.limit_s:
            print(f"no time left for {case.name}")
            continue
        if case.mode.startswith("qlora") and not has_bits:
            print(f"left out, bitsandbytes is not installed: {case.name}")
            continue
        if args.tiny and (case.mode.endswith("fp8") or case.mode == "qlora-nf4"):
            continue
        try:
            found.append(run(case, device=device, dtype=dtype, tiny=args.tiny))
        except (RuntimeError, VistuneError) as error:  # out of memory is one of them
            found.append({"case": case.name, "note": str(error).splitlines()[0][:80]})
        print("ROW " + json.dumps(found[-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    errors = [abs(row["error"]) for row in found if "error" in row]
    if errors:
        print(
            f"{len(errors)} measured; largest error {max(errors):.1%}, mean {np.mean(errors):.1%}"
        )


if __name__ == "__main__":
    main()

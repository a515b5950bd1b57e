"""Predicted and measured peak memory of transformers' own vision-language models at real sizes.

    python bench/h200/native_grid.py [--limit-s 420] [--rows NAME ...] [--tiny]
        [--predict | --measure]

Every row builds its model of random numbers on the device (nothing is read or written), sets it up
as `vistune train` does, runs optimizer steps on one drawn row of images of several sizes through
the functions that training runs (`LossModule`, `backward_step`, the optimizer), and prints
predicted and measured peak, what attention runs as, and the median time of five steps after two of
warm-up; `varied` rows differ in length from step to step and give the mean of ten steps after ten.
`--rows` takes whole names of rows, which then run alone, or parts of names. Rows that need
liger-kernel or bitsandbytes are left out, and said, where these do not run. `--predict` only
predicts, for a GPU, wherever it runs; `--measure` only measures. `--tiny` shrinks every model, to
try the script on a CPU (nothing is measured there).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from native_models import CONFIGS
from plan_grid import timed_steps

from vistune.data.collate import pack_row
from vistune.errors import VistuneError
from vistune.models.attention.install import install_attention
from vistune.models.budget import usable_bytes
from vistune.models.compiled import compile_blocks
from vistune.models.facts import ModelFacts
from vistune.models.kernels import has_liger, install_kernels
from vistune.models.memory import RowSize
from vistune.models.modes import let_layers_recompute, set_training_mode
from vistune.models.native import NATIVE, NativeVLM, native_skeleton
from vistune.models.native_memory import native_memory
from vistune.models.native_passes import num_patches
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import Tuning, apply_tuning
from vistune.models.tune.quantize import quantize_frozen
from vistune.recipe import TrainConfig, TuneConfig
from vistune.types import EncodedSample, ImageDefaults

_GRIDS = ((46, 62), (24, 36), (80, 54), (32, 32), (16, 70))
"""Rows and columns of patches of images of any size, in turn."""
_TILES = (7, 5, 13, 1, 4)
"""Tiles of images that are cut, in turn; a tower of squares sees one of each."""
_WARM_UP, _TIMED = 2, 5
_VARIED = (1.0, 0.93, 0.8, 0.87, 0.74)
"""Shares of the tokens that the rows of a varied configuration have, in turn."""


@dataclass(frozen=True)
class Row:
    """One configuration: model, what trains, tokens of the row, and the rest."""

    model: str
    mode: str
    tokens: int
    layers: int = 0
    tower_layers: int = 0
    vision: str = "freeze"
    kernels: str = "torch"
    compiled: bool = False
    varied: bool = False

    @property
    def name(self) -> str:
        extra = f" recompute {self.layers}" if self.layers else ""
        extra += f" {self.kernels}" if self.kernels != "torch" else ""
        extra += " varied" if self.varied else ""
        extra += " compiled" if self.compiled else ""
        extra += f" tower {self.vision}" if self.vision != "freeze" else ""
        extra += f" tower recompute {self.tower_layers}" if self.tower_layers else ""
        return f"{self.model} {self.mode} {self.tokens}{extra}"

    @property
    def tune(self) -> TuneConfig:
        lora = {"mode": "lora", "rank": 64, "alpha": 128}
        language = {
            "frozen": {"mode": "freeze"},
            "lora": lora,
            "qlora-nf4": {**lora, "frozen_format": "nf4"},
            "qlora-int8": {**lora, "frozen_format": "int8"},
            "full": {"mode": "full"},
        }[self.mode]
        # A tied head trains with the language model.
        own_head = not CONFIGS[self.model].get("tie_word_embeddings", True)
        head = {"mode": "full" if self.mode == "full" and own_head else "freeze"}
        vision: dict[str, Any] = {"mode": self.vision}
        vision |= {"rank": 64, "alpha": 128} if self.vision == "lora" else {}
        return TuneConfig.model_validate(
            {"language": language, "head": head, "vision": vision, "connector": {"mode": "full"}}
        )


ROWS = (
    Row("qwen2.5-vl-7b", "lora", 8192),
    Row("qwen2.5-vl-7b", "lora", 16384, layers=28),
    Row("qwen2.5-vl-7b", "frozen", 12288),
    Row("qwen2.5-vl-3b", "lora", 12288),
    Row("qwen2.5-vl-3b", "lora", 12288, kernels="liger"),
    Row("qwen2.5-vl-3b", "lora", 8192),
    Row("qwen2.5-vl-3b", "lora", 8192, kernels="liger"),
    Row("qwen2.5-vl-3b", "qlora-nf4", 8192),
    Row("qwen2.5-vl-3b", "qlora-int8", 8192),
    Row("qwen2.5-vl-7b", "qlora-nf4", 16384, layers=28),
    Row("qwen2.5-vl-3b", "full", 8192),
    Row("qwen2.5-vl-3b", "full", 8192, kernels="liger"),
    Row("qwen2.5-vl-3b", "full", 16384, layers=36),
    Row("qwen2.5-vl-3b", "lora", 8192, vision="full"),
    Row("qwen2.5-vl-3b", "lora", 8192, vision="full", tower_layers=32),
    Row("qwen3-vl-4b", "lora", 12288),
    Row("qwen3-vl-4b", "frozen", 16384, layers=18),
    Row("internvl3-2b", "lora", 16384),
    Row("internvl3-2b", "lora", 8192),
    Row("internvl3-2b", "lora", 8192, kernels="liger"),
    Row("internvl3-2b", "qlora-nf4", 8192),
    Row("internvl3-2b", "full", 8192, vision="full"),
    Row("smolvlm-2.2b", "lora", 12288),
    Row("smolvlm-2.2b", "full", 8192, layers=12),
    Row("gemma3-4b", "lora", 8192),
    Row("gemma3-4b", "lora", 8192, kernels="liger"),
    Row("gemma3-4b", "frozen", 12288),
    *(
        Row(model, "lora", 8192, varied=True, compiled=compiled)
        for model in CONFIGS
        for compiled in (False, True)
    ),
)


def facts_of(row: Row, *, tiny: bool, untied: bool = False) -> ModelFacts:
    """Describes a model at its real size, or with a few narrow blocks.

    Args:
        row: Says which model.
        tiny: Shrink it.
        untied: Give it a head of its own where the published one is tied to the embeddings.
    """
    from transformers import AutoConfig

    values = json.loads(json.dumps(CONFIGS[row.model]))
    if untied:
        values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = False
    if tiny:
        _shrink(values)
    config = AutoConfig.for_model(**values)
    family = NATIVE.get(config.model_type)
    grey = ImageDefaults(224, (0.5,) * 3, (0.5,) * 3, "bicubic")
    return ModelFacts(
        tokenizer=None,
        image_token_id=family.image_token_id(config),
        grid=family.grid(config),
        image_defaults=grey,
        vision_config=config.vision_config,
        text_config=config.get_text_config(),
        tower=None,
        whole_config=config,
    )


def _shrink(values: dict[str, Any]) -> None:
    text, vision = values["text_config"], values["vision_config"]
    text |= {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
    vision |= {"hidden_size": 32, "intermediate_size": 64}
    heads = "num_heads" if "num_heads" in vision else "num_attention_heads"
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    vision |= {heads: 2, depth: 4}
    for name, value in (
        ("out_hidden_size", 64),
        ("deepstack_visual_indexes", [0, 2]),
        ("fullatt_block_indexes", [1]),
    ):
        if name in vision:
            vision[name] = value


def draw_row(num_tokens: int, model: NativeVLM, *, first: int = 0) -> Any:
    """Fills a row with samples of one image, 20 tokens of question and 28 of answer."""
    samples: list[EncodedSample] = []
    left = num_tokens
    for number in range(first, first + 10**6):
        pixels, shapes, num_image = _image(model, number)
        each = num_image + 48
        if each > left and samples:
            break
        left -= each
        ids = np.full(each, 5)
        ids[1 : 1 + num_image] = model.image_token_id
        places = np.arange(each)
        samples.append(
            EncodedSample(
                id=str(number),
                source="s",
                input_ids=ids,
                target_mask=places >= each - 28,
                pixel_values=[pixels],
                num_image_tokens=num_image,
                image_shapes=shapes,
                position_ids=np.stack([places] * 3) if len(pixels.shape) == 2 else None,
            )
        )
    return pack_row(samples)


def _image(model: NativeVLM, number: int) -> tuple[Any, tuple[Any, ...], int]:
    """Returns pixels, what is said of them, and the image tokens of the number-th image."""
    (_, *values), blank = model.family.blank(model.config)
    grid = model.grid
    if len(values) == 1:
        rows, columns = _GRIDS[number % len(_GRIDS)]
        shapes: tuple[Any, ...] = ((1, rows, columns),)
        count, tokens = rows * columns, rows * columns // grid.downsample**2
    else:
        count = 1 if model.config.model_type == "gemma3" else _TILES[number % len(_TILES)]
        shapes = blank
        tokens = count * grid.num_tokens(*values[-2:])
    pixels = np.random.default_rng(number).standard_normal((count, *values), dtype=np.float32)
    return pixels, shapes, tokens


def size_of(row: Any, model: NativeVLM) -> RowSize:
    """Returns what of a row decides its memory."""
    return RowSize(
        num_tokens=row.num_tokens,
        num_images=row.num_samples,
        num_targets=row.num_targets,
        num_tail_tokens=row.num_tokens,
        num_patches=num_patches(row.pixel_values_NCYX.shape, model.grid.patch_px),
        num_pairs=int((row.cu_seqlens.diff().long() ** 2).sum()),
    )


def run(
    case: Row,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tiny: bool,
    kind: str,
    predict: bool = True,
    measure: bool = True,
) -> dict[str, Any]:
    """Predicts and measures one configuration, or does one of both."""
    facts = facts_of(case, tiny=tiny)
    depth = int(facts.text_config.num_hidden_layers)
    layers = min(case.layers, depth)
    train = TrainConfig.model_validate(
        {
            "steps": 2,
            "checkpoint_tower_layers": case.tower_layers,
            "kernels": case.kernels,
            "compile": "blocks" if case.compiled else False,
        }
    )
    with torch.device("meta"):
        described = native_skeleton(facts)
    row = draw_row(case.tokens if not tiny else 2000, described)
    size = size_of(row, described)
    found: dict[str, Any] = {
        "row": case.name,
        "tokens": row.num_tokens,
        "images": row.num_samples,
        "patches": size.num_patches,
        "targets": row.num_targets,
    }
    if predict:
        started_s = time.perf_counter()
        memory = native_memory(facts, tune=case.tune, train=train, dtype=dtype, kind=kind)
        found["planning_s"] = round(time.perf_counter() - started_s, 1)
        predicted = memory.predict(size, checkpoint_layers=layers)
        found["predicted_gib"] = round(predicted.peak_gib, 3)
        found["phase"] = predicted.phase
        total = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 1 << 62
        if measure and predicted.peak > usable_bytes(total / 2**30):
            return found | {"note": "predicted not to fit, not run"}
    if not measure:
        return found
    model = build(facts, device=device, dtype=dtype)
    with torch.device(device):
        tuning = apply_tuning(model, case.tune, seed=0)
    set_up = set_up_steps(
        model, tuning, train=train, num_recomputed=layers, device=device, dtype=dtype
    )
    rows, warm_up, timed = [row], _WARM_UP, _TIMED
    if case.varied:
        tokens = case.tokens if not tiny else 2000
        parts = enumerate(_VARIED)
        rows = [draw_row(int(part * tokens), described, first=n) for n, part in parts]
        warm_up = timed = 2 * len(rows)
    times, sums = timed_steps(
        model, tuning, rows, train=train, device=device, dtype=dtype, num_steps=warm_up + timed
    )
    found["runs_as"], found["loss_is_finite"] = set_up, sums.is_finite
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated() / 2**30
        found["measured_gib"] = round(measured, 3)
        if predict:
            found["error"] = round(predicted.peak_gib / measured - 1, 4)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        found["standing_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    step_s = (statistics.mean if case.varied else statistics.median)(times[warm_up:])
    tokens = statistics.mean(row.num_tokens for row in rows)
    found["step_s"], found["tokens_per_s"] = round(step_s, 4), round(tokens / step_s)
    found["steps_s"] = [round(s, 3) for s in times]
    return found


def build(facts: ModelFacts, *, device: torch.device, dtype: torch.dtype) -> NativeVLM:
    """Builds a model of random numbers on a device; its tables are computed as in real ones."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = native_skeleton(facts)
    finally:
        torch.set_default_dtype(before)
    model.to(dtype)
    # What builds without drawing weights leaves a tied head a weight of its own.
    model.inner.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def set_up_steps(
    model: NativeVLM,
    tuning: Tuning,
    *,
    train: TrainConfig,
    num_recomputed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Puts in place how a model computes, as a run does; peak memory is counted from here on.

    Returns:
        What attention, kernels and frozen weights run as.
    """
    tune = tuning.tune
    held = tune.held_format("language")
    if held == "int8" or held == "nf4":
        quantize_frozen(model, "language", held, dtype=dtype, device=device)
    set_training_mode(model, tune, model.module_map)
    set_checkpoint_layers(model, num_recomputed)
    if train.checkpoint_tower_layers:
        set_checkpoint_layers(model, train.checkpoint_tower_layers, role="vision")
    let_layers_recompute(model)
    attention = install_attention(
        model,
        wanted="auto",
        dtype=dtype,
        device=device,
        drops_weights=tune.language.mode != "freeze",
        opaque=bool(train.compile),
    )
    said = [attention.language.name, attention.vision.name, f"frozen weights {held}"]
    said.append(str(install_kernels(model, wanted=train.kernels, fused=False, device=device)))
    if train.compile:
        said.append(
            compile_blocks(
                model, mode=train.compile, fused=False, attention=attention.language.name
            )
        )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return "; ".join(said)


def is_asked_for(row: Row, asked: list[str]) -> bool:
    """Whether a row is named, whole or in part; a whole name is that row's alone."""
    names = {other.name for other in ROWS}
    return any(row.name == name or (name not in names and name in row.name) for name in asked)


def why_left_out(row: Row, *, tiny: bool) -> str | None:
    """Returns which package a row needs that does not run here, or None."""
    if row.kernels == "liger" and (tiny or not has_liger()):
        return "liger-kernel"
    needs_bits = row.mode.startswith("qlora")
    missing = importlib.util.find_spec("bitsandbytes") is None
    return "bitsandbytes" if needs_bits and missing else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-s", type=float, default=420.0, help="start no row after this")
    parser.add_argument("--rows", nargs="*", default=[""], help="names of rows, or parts of them")
    parser.add_argument("--tiny", action="store_true")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--predict", action="store_true", help="measure nothing")
    one.add_argument("--measure", action="store_true", help="predict nothing")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    dtype = torch.float32 if args.tiny and not args.predict else torch.bfloat16
    kind = "cuda" if args.predict else device.type
    started_s, found = time.perf_counter(), []
    for case in [case for case in ROWS if is_asked_for(case, args.rows)]:
        if time.perf_counter() - started_s > args.limit_s:
            print(f"no time left for {case.name}")
            continue
        missing = None if args.predict else why_left_out(case, tiny=args.tiny)
        if missing is not None:
            print(f"left out, {missing} does not run here: {case.name}")
            continue
        try:
            made = run(
                case, device=device, dtype=dtype, tiny=args.tiny, kind=kind,
                predict=not args.measure, measure=not args.predict,
            )  # fmt: skip
        except (RuntimeError, VistuneError) as error:  # out of memory is one of them
            made = {"row": case.name, "note": str(error).splitlines()[0][:160]}
        found.append(made)
        print("ROW " + json.dumps(made), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
    errors = [abs(row["error"]) for row in found if "error" in row]
    if errors:
        print(
            f"{len(errors)} measured; largest error {max(errors):.1%}, mean {np.mean(errors):.1%}"
        )


if __name__ == "__main__":
    main()

"""Predicted and measured peak memory of transformers' own vision-language models at real sizes.

    python bench/h200/native_grid.py [--limit-s 420] [--rows SUBSTRING] [--tiny] [--predict]

Every row builds its model of random numbers on the device (nothing is read or written), sets it up
as `vistune train` does, runs optimizer steps on one drawn row of images of several sizes through
the functions that training runs (`LossModule`, `backward_step`, the optimizer), and prints
predicted and measured peak, the steps' times and what attention runs as. `--predict` only predicts,
for a GPU, wherever it runs. `--tiny` shrinks every model, to try the script on a CPU (nothing is
measured there).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vistune.data.collate import pack_row
from vistune.errors import VistuneError
from vistune.models.attention.install import install_attention
from vistune.models.budget import usable_bytes
from vistune.models.facts import ModelFacts
from vistune.models.kernels import has_liger, install_kernels
from vistune.models.memory import RowSize
from vistune.models.modes import let_layers_recompute, set_training_mode
from vistune.models.native import NATIVE, NativeVLM, native_skeleton
from vistune.models.native_memory import native_memory
from vistune.models.native_passes import num_patches
from vistune.models.recompute import set_checkpoint_layers
from vistune.models.tune import Tuning, apply_tuning
from vistune.parallel import SingleProcess
from vistune.recipe import TrainConfig, TuneConfig
from vistune.train.optim import build_optimizer
from vistune.train.step import LossModule, backward_step
from vistune.types import EncodedSample, ImageDefaults

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_INTERN_VIT = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.1,
}
_QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        **more,
    }


def _qwen25(out: int, text: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": _MROPE, "tie_word_embeddings": tied},
        "vision_config": {**_QWEN25_VISION, "out_hidden_size": out},
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": _qwen25(3584, _text(3584, 18944, 28, 28, 4, vocab_size=152064), tied=False),
    "qwen2.5-vl-3b": _qwen25(2048, _text(2048, 11008, 36, 16, 2, vocab_size=151936), tied=True),
    "qwen3-vl-4b": {
        "model_type": "qwen3_vl",
        "text_config": {
            **_text(2560, 9728, 36, 32, 8, vocab_size=151936, head_dim=128),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
        **_QWEN_IDS,
    },
    "internvl3-2b": {
        "model_type": "internvl",
        "text_config": {
            "model_type": "qwen2",
            **_text(1536, 8960, 28, 12, 2, vocab_size=151674),
            "tie_word_embeddings": False,
        },
        "vision_config": _INTERN_VIT,
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    },
    "smolvlm-2.2b": {
        "model_type": "smolvlm",
        "text_config": {
            "model_type": "llama",
            **_text(2048, 8192, 24, 32, 32, vocab_size=49280, head_dim=64),
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **_SIGLIP,
            "model_type": "smolvlm_vision",
            "image_size": 384,
        },
        "scale_factor": 3,
        "image_token_id": 49190,
        "tie_word_embeddings": False,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            **_text(2560, 10240, 34, 8, 4, vocab_size=262208, head_dim=256),
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
        },
        "vision_config": {**_SIGLIP, "image_size": 896},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
    },
}

_GRIDS = ((46, 62), (24, 36), (80, 54), (32, 32), (16, 70))
"""Rows and columns of patches of images of any size, in turn."""
_TILES = (7, 5, 13, 1, 4)
"""Tiles of images that are cut, in turn; a tower of squares sees one of each."""


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

    @property
    def name(self) -> str:
        extra = f" recompute {self.layers}" if self.layers else ""
        extra += f" {self.kernels}" if self.kernels != "torch" else ""
        extra += f" tower {self.vision}" if self.vision != "freeze" else ""
        extra += f" tower recompute {self.tower_layers}" if self.tower_layers else ""
        return f"{self.model} {self.mode} {self.tokens}{extra}"

    @property
    def tune(self) -> TuneConfig:
        language = {
            "frozen": {"mode": "freeze"},
            "lora": {"mode": "lora", "rank": 64, "alpha": 128},
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
    Row("qwen2.5-vl-3b", "full", 8192),
    Row("qwen2.5-vl-3b", "full", 16384, layers=36),
    Row("qwen2.5-vl-3b", "lora", 8192, vision="full"),
    Row("qwen2.5-vl-3b", "lora", 8192, vision="full", tower_layers=32),
    Row("qwen3-vl-4b", "lora", 12288),
    Row("qwen3-vl-4b", "frozen", 16384, layers=18),
    Row("internvl3-2b", "lora", 16384),
    Row("internvl3-2b", "full", 8192, vision="full"),
    Row("smolvlm-2.2b", "lora", 12288),
    Row("smolvlm-2.2b", "full", 8192, layers=12),
    Row("gemma3-4b", "lora", 8192),
    Row("gemma3-4b", "lora", 8192, kernels="liger"),
    Row("gemma3-4b", "frozen", 12288),
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
    text |= {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96}
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


def draw_row(num_tokens: int, model: NativeVLM) -> Any:
    """Fills a row with samples of one image, 20 tokens of question and 28 of answer."""
    samples: list[EncodedSample] = []
    left = num_tokens
    for number in range(10**6):
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
    case: Row, *, device: torch.device, dtype: torch.dtype, tiny: bool, kind: str, measure: bool
) -> dict[str, Any]:
    """Predicts and measures one configuration."""
    facts = facts_of(case, tiny=tiny)
    depth = int(facts.text_config.num_hidden_layers)
    layers = min(case.layers, depth)
    train = TrainConfig.model_validate(
        {
            "steps": 2,
            "checkpoint_tower_layers": case.tower_layers,
            "kernels": case.kernels,
        }
    )
    started_s = time.perf_counter()
    memory = native_memory(facts, tune=case.tune, train=train, dtype=dtype, kind=kind)
    planning_s = time.perf_counter() - started_s
    with torch.device("meta"):
        described = native_skeleton(facts)
    row = draw_row(case.tokens if not tiny else 2000, described)
    size = size_of(row, described)
    predicted = memory.predict(size, checkpoint_layers=layers)
    found: dict[str, Any] = {
        "row": case.name,
        "tokens": row.num_tokens,
        "images": row.num_samples,
        "patches": size.num_patches,
        "targets": row.num_targets,
        "predicted_gib": round(predicted.peak_gib, 3),
        "phase": predicted.phase,
        "planning_s": round(planning_s, 1),
    }
    if not measure:
        return found
    fits = usable_bytes(torch.cuda.mem_get_info()[1] / 2**30) if device.type == "cuda" else 1 << 62
    if predicted.peak > fits:
        return found | {"note": "predicted not to fit, not run"}
    model = build(facts, device=device, dtype=dtype)
    with torch.device(device):
        tuning = apply_tuning(model, case.tune, seed=0)
    times, attention, peaks = run_steps(
        model, tuning, row, train=train, num_recomputed=layers, device=device, dtype=dtype
    )
    found["attention"] = attention
    found["loss_is_finite"] = peaks.pop("finite")
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated() / 2**30
        found["measured_gib"] = round(measured, 3)
        found["error"] = round(predicted.peak_gib / measured - 1, 4)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        found |= peaks
    found["step_s"] = [round(s, 3) for s in times]
    found["tokens_per_s"] = round(row.num_tokens / min(times))
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


def run_steps(
    model: NativeVLM,
    tuning: Tuning,
    row: Any,
    *,
    train: TrainConfig,
    num_recomputed: int,
    device: torch.device,
    dtype: torch.dtype,
    num_steps: int = 4,
) -> tuple[Sequence[float], str, dict[str, Any]]:
    """Runs optimizer steps on one row.

    Returns:
        The steps' times in seconds without the first one, what attention and kernels run as, and
        the peaks of the passes and of the update in GiB beside whether the loss was finite.
    """
    tune = tuning.tune
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
    )
    kernels = install_kernels(model, wanted=train.kernels, fused=False, device=device)
    gc.collect()
    on_gpu = device.type == "cuda"
    peaks: dict[str, Any] = {}
    strategy = SingleProcess()
    vocabulary = int(model.config.get_text_config().vocab_size)
    module = strategy.prepare(
        LossModule(model, sources=("s",), vocabulary_size=vocabulary),
        lambda _: build_optimizer(model.named_parameters(), tuning.groups(train), train),
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        sums = backward_step(
            strategy,
            module,
            [row],
            sources=("s",),
            device=device,
            autocast_dtype=torch.bfloat16 if dtype is torch.bfloat16 else None,
            clip_norm=1.0,
        )
        if on_gpu:
            peaks["passes_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        peaks["finite"] = sums.is_finite
        strategy.step(lr_factor=1e-3)
        if on_gpu:
            torch.cuda.synchronize()
            peaks["standing_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
        times.append(time.perf_counter() - started_s)
    return times[1:], f"{attention.language.name}; {attention.vision.name}; {kernels}", peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-s", type=float, default=420.0, help="start no row after this")
    parser.add_argument("--rows", default="", help="rows whose name contains this")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    dtype = torch.float32 if args.tiny and not args.predict else torch.bfloat16
    kind = "cuda" if args.predict else device.type
    started_s, found = time.perf_counter(), []
    for case in ROWS:
        if args.rows not in case.name:
            continue
        if time.perf_counter() - started_s > args.limit_s:
            print(f"no time left for {case.name}")
            continue
        if case.kernels == "liger" and not args.predict and (args.tiny or not has_liger()):
            print(f"left out, liger-kernel does not run here: {case.name}")
            continue
        try:
            made = run(
                case, device=device, dtype=dtype, tiny=args.tiny, kind=kind,
                measure=not args.predict,
            )  # fmt: skip
        except (RuntimeError, VistuneError) as error:  # out of memory is one of them
            made = {"row": case.name, "note": str(error).splitlines()[0][:160]}
        found.append(made)
        print("ROW " + json.dumps(made), flush=True)
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

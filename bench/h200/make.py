"""Makes models and datasets of the real size from random numbers: nothing is downloaded.

    python bench/h200/make.py FOLDER --tokenizer DIR [--size 7b|13b|gemma-2b]

Writes FOLDER/tower (CLIP-L/14 at 336 px), FOLDER/llm-SIZE (Llama or Gemma), FOLDER/images and the
datasets FOLDER/stage1.json and FOLDER/stage2.json with the length distributions that
bench/README.md states. The tokenizer directory has to hold a Llama-2 tokenizer (tokenizer.json,
tokenizer_config.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
)

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "7b-8": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
    "gemma-2b": {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18},
}
HEADS = {"tiny": 8, "7b": 32, "7b-8": 32, "13b": 40, "gemma-2b": 8}
NUM_IMAGES = 256


def text_config(size: str, *, vocab_size: int = 32000) -> PreTrainedConfig:
    """Returns the config of a language model of a public size."""
    shape = {**SIZES[size], "num_attention_heads": HEADS[size], "max_position_embeddings": 4096}
    if size.startswith("gemma"):
        return GemmaConfig(**shape, num_key_value_heads=1, head_dim=256, vocab_size=256000)
    return LlamaConfig(**shape, vocab_size=vocab_size)


def save_random(build: Callable[..., object], config: object, folder: Path, device: str) -> None:
    """Writes a model's weights: normal(0, 0.02) matrices, unit norms, zero biases, in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = build(config)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() < 2:
            fill = torch.ones if "norm" in name and name.endswith("weight") else torch.zeros
            state[name] = fill(tensor.shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(
                tensor.shape, generator=generator, device=device, dtype=torch.bfloat16
            )
            state[name] = drawn.mul_(0.02).cpu()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)  # type: ignore[attr-defined]


def make_tower(folder: Path, device: str) -> None:
    """Writes CLIP-L/14 at 336 px."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    save_random(CLIPVisionModel, config, folder, device)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 336, "width": 336},
        "size": {"shortest_edge": 336},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def make_language_model(folder: Path, size: str, tokenizer: Path, device: str) -> None:
    """Writes a language model of a public size with the tokenizer beside it."""
    save_random(AutoModelForCausalLM.from_config, text_config(size), folder, device)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


def clipped_lognormal(
    rng: np.random.Generator, median: float, sigma: float, low: int, high: int, n: int
) -> list[int]:
    """Draws text lengths in tokens."""
    drawn = np.exp(rng.normal(np.log(median), sigma, n))
    return [int(v) for v in drawn.clip(low, high)]


def make_data(folder: Path) -> None:
    """Writes images and both datasets; ' a' is one token of the Llama vocabulary."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    for number in range(NUM_IMAGES):
        height, width = rng.integers(300, 640, 2)
        coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.BICUBIC)
        picture.save(folder / "images" / f"{number}.jpg", quality=90)

    def row(number: int, question: str, answer: str, image: bool) -> dict[str, object]:
        head = "<image>\n" if image else ""
        turns = [
            {"from": "human", "value": head + question},
            {"from": "gpt", "value": answer},
        ]
        seen = {"image": f"{number % NUM_IMAGES}.jpg"} if image else {}
        return {"id": str(number), "conversations": turns, **seen}

    lengths = clipped_lognormal(rng, 22, 0.5, 6, 120, 4096)
    rows = [row(i, "x", " ".join("a" * max(1, n - 2)), True) for i, n in enumerate(lengths)]
    (folder / "stage1.json").write_text(json.dumps(rows))

    lengths = clipped_lognormal(rng, 170, 0.85, 16, 1400, 4096)
    rows = []
    for i, n in enumerate(lengths):
        answer = max(1, int(0.6 * n) - 1)
        question = max(1, n - answer - 50)  # the template's own text is about 50 tokens
        image = bool(rng.random() > 0.06)
        rows.append(row(i, " ".join("a" * question), " ".join("a" * answer), image))
    (folder / "stage2.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (args.folder / "stage2.json").is_file():
        make_tower(args.folder / "tower", device)
        make_data(args.folder)
    make_language_model(args.folder / f"llm-{args.size}", args.size, args.tokenizer, device)


if __name__ == "__main__":
    main()

"""Tokenizers, plans and encoders that the data tests share."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import normalizers

from vistune.data.encode import Encoder
from vistune.data.image import ImagePlan
from vistune.data.template import TEMPLATES
from vistune.types import VisionGrid

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@functools.cache
def llama_tokenizer(*, legacy: bool = True, bos: bool = True, extra: tuple[str, ...] = ()) -> Any:
    from transformers import LlamaTokenizer

    folder = FIXTURES / "tokenizers" / "llama_like"
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy, add_bos_token=bos)
    if legacy:
        # The public code's slow tokenizer puts a blank in front of every stretch of text, even of
        # one that starts with a blank; transformers 5 leaves the latter out.
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.pre_tokenizer = None
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    return tokenizer


@functools.cache
def gemma_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(FIXTURES / "tokenizers" / "gemma_like" / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def make_plan(**change: Any) -> ImagePlan:
    values = {"mode": "pad", "size_px": 28, "mean": CLIP_MEAN, "std": CLIP_STD, **change}
    return ImagePlan(**values)


def make_encoder(template: Any = "vicuna_v1", tokenizer: Any = None, **change: Any) -> Encoder:
    tokenizer = llama_tokenizer() if tokenizer is None else tokenizer
    values = {
        "tokenizer": tokenizer,
        "template": TEMPLATES.get(template) if isinstance(template, str) else template,
        "image_plan": make_plan(),
        "grid": VisionGrid(patch_px=14),
        "image_token_id": len(tokenizer),
        **change,
    }
    return Encoder(**values)


def write_rows(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    """Writes rows as JSONL (or as a JSON list, by suffix); a row of bytes is written as it is."""
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = folder / name
    path.write_bytes(b"[" + b",\n".join(raw) + b"]" if name.endswith(".json") else b"\n".join(raw))
    return path


def talk(*texts: str) -> list[dict[str, str]]:
    """LLaVA's `conversations` of texts said in turn, the human first."""
    return [
        {"from": "human" if k % 2 == 0 else "gpt", "value": text} for k, text in enumerate(texts)
    ]


def make_images(folder: Path, number: int, *, size: tuple[int, int] = (40, 30)) -> list[str]:
    """Writes small JPEG files and returns their names."""
    rng = np.random.default_rng(number)
    names = []
    for k in range(number):
        values = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{k}.jpg")
        names.append(f"{k}.jpg")
    return names

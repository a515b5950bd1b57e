"""The tiny VisualGLM of the parity fixture, for the tests of this folder. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vistune.compare.parity import TOLERANCE
from vistune.compare.parity import relative_error as relative_error
from vistune.models.visualglm import VisualGLMConfig, VisualGLMForConditionalGeneration
from vistune.models.visualglm.keys import hf_map

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "visualglm"
REL = TOLERANCE
SOP, EOP, GMASK, IMAGE = 304, 305, 301, 320


def load_config() -> VisualGLMConfig:
    settings = json.loads((FIXTURE / "config.json").read_text())
    return VisualGLMConfig.from_public(settings, where="config.json")


def public_tensors() -> dict[str, Tensor]:
    return load_file(FIXTURE / "model.safetensors")


def load_model() -> VisualGLMForConditionalGeneration:
    config = load_config()
    model = VisualGLMForConditionalGeneration(config)
    own = hf_map(config).from_public(public_tensors(), where="fixture")
    model.load_state_dict(own, strict=True)
    return model.eval()


def load_arrays() -> dict[str, Tensor]:
    with np.load(FIXTURE / "io.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def sample(question: list[int], answer: list[int], *, num_image_tokens: int = 0) -> Tensor:
    """Ids of one conversation: question, image and markers, answer."""
    image = [10, 11, *[IMAGE] * num_image_tokens] if num_image_tokens else []
    return torch.tensor([*image, *question, GMASK, SOP, *answer, EOP])


def pack(samples: list[Tensor]) -> dict[str, Any]:
    """Puts samples end to end, as a training row is."""
    lengths = [len(ids) for ids in samples]
    return {
        "input_ids_BT": torch.cat(samples)[None],
        "position_ids_BT": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def answer_loss(
    model: VisualGLMForConditionalGeneration, samples: list[Tensor], pixels: Tensor | None
) -> Tensor:
    """Summed cross-entropy of the answers of a packed row, `<sop>` among them."""
    row = pack(samples)
    hidden = model.hidden_states(**row, pixel_values_NCYX=pixels)
    ids = row["input_ids_BT"][0]
    starts = row["cu_seqlens"].tolist()
    index = [
        start + t
        for start, one in zip(starts[:-1], samples, strict=True)
        for t in range(one.tolist().index(SOP), len(one))
    ]
    at = torch.tensor(index)
    return F.cross_entropy(model.logits(hidden[0, at - 1]).float(), ids[at], reduction="sum")


def train_pieces(folder: Path) -> Path:
    """Trains a small sentencepiece file with ChatGLM-6B's special pieces; returns its path."""
    corpus = folder / "corpus.txt"
    lines = (
        "你好，这张图片的背景里有什么内容？",
        "问：图里有什么 答：一只猫坐在垫子上",
        "The quick brown fox jumps over the lazy dog",
        "a picture of a cat on a mat <img></img>",
        "Q:what is it A:a red disc",
    )
    corpus.write_text("\n".join(lines * 20), encoding="utf-8")
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    special = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "ice_text"),
        vocab_size=320,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>", "<|tab|>", *blanks, *special],
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "ice_text.model"

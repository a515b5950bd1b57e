"""The tiny CogVLM2 of the parity fixture, for the tests of this folder. Not a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vistune.compare.parity import TOLERANCE
from vistune.compare.parity import relative_error as relative_error
from vistune.models.cogvlm2 import CogVLM2Config, CogVLM2ForConditionalGeneration

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "cogvlm2"
REL = TOLERANCE


def load_config(**changes: object) -> CogVLM2Config:
    settings = json.loads((FIXTURE / "config.json").read_text())
    return CogVLM2Config(**{**settings, **changes})


def load_model(**changes: object) -> CogVLM2ForConditionalGeneration:
    model = CogVLM2ForConditionalGeneration(load_config(**changes))
    model.load_state_dict(load_file(FIXTURE / "model.safetensors"), strict=True)
    return model.eval()


def load_arrays() -> dict[str, Tensor]:
    with np.load(FIXTURE / "io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def pack(samples: list[Tensor]) -> dict[str, object]:
    """Puts samples end to end, as a training row is."""
    lengths = [len(sample) for sample in samples]
    return {
        "input_ids_BT": torch.cat(samples)[None],
        "position_ids_BT": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def text_loss(model: CogVLM2ForConditionalGeneration, hidden_1TD: Tensor, row: dict) -> Tensor:
    """Summed cross-entropy of every text token that follows another in its sample."""
    ids = row["input_ids_BT"][0]
    starts = set(row["cu_seqlens"].tolist())
    at = [t for t in range(1, len(ids)) if t not in starts and ids[t] != model.image_token_id]
    index = torch.tensor(at)
    logits = model.logits(hidden_1TD[0, index - 1])
    return F.cross_entropy(logits.float(), ids[index], reduction="sum")

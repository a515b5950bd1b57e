"""The tiny MGM of the parity fixture, for the tests of this folder. Not a test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vistune.compare.parity import TOLERANCE
from vistune.compare.parity import relative_error as relative_error
from vistune.models.mgm import MGMConfig, MGMForConditionalGeneration
from vistune.models.mgm.keys import mgm_map

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "mgm_gemma"
REL = TOLERANCE
RUNS = ("grid1", "grid2", "grid2_global")
_HEAD = "language_model.lm_head.weight"
_TABLE = "language_model.model.embed_tokens.weight"


def settings(run: str) -> dict[str, Any]:
    """The fixture's settings with those of one run among them."""
    everything = json.loads((FIXTURE / "config.json").read_text())
    return {**everything, **everything["runs"][run]}


def public_tensors() -> dict[str, Tensor]:
    return load_file(FIXTURE / "model.safetensors")


def load_config(run: str) -> MGMConfig:
    shapes = {name: tuple(tensor.shape) for name, tensor in public_tensors().items()}
    return MGMConfig.from_public(settings(run), shapes, where="config.json")


def load_model(run: str, **changes: Any) -> MGMForConditionalGeneration:
    config = load_config(run)
    for name, value in changes.items():
        setattr(config, name, value)
    model = MGMForConditionalGeneration(config)
    own = mgm_map(config).from_public(public_tensors(), where="fixture")
    model.load_state_dict({**own, _HEAD: own[_TABLE]}, strict=True)
    return model.eval()


def load_arrays(run: str) -> dict[str, Tensor]:
    with np.load(FIXTURE / f"io_{run}.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


@dataclass
class Rows:
    """The fixture's rows with image tokens expanded, padded on the right."""

    ids: Tensor
    mask: Tensor
    pixels: Tensor


def expanded(model: MGMForConditionalGeneration, arrays: dict[str, Tensor]) -> Rows:
    num_tokens = model.grid.num_tokens(*arrays["images_aux"].shape[-2:])
    rows, with_image = [], []
    for row, ids in enumerate(arrays["input_ids"].tolist()):
        kept = ids[: int(arrays["attention_mask"][row].sum())]
        out: list[int] = []
        for token in kept:
            out += [model.image_token_id] * num_tokens if token == -200 else [token]
        with_image += [row] * kept.count(-200)
        rows.append(out)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return Rows(ids, mask, arrays["images_aux"][with_image])


def pack(samples: list[Tensor]) -> dict[str, Any]:
    """Puts samples end to end, as a training row is."""
    lengths = [len(ids) for ids in samples]
    return {
        "input_ids_BT": torch.cat(samples)[None],
        "position_ids_BT": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }

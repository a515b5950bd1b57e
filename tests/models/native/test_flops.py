"""Operations of transformers' own models, as torch counts them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import KINDS, write_native

from vistune.assembly import load_assembled
from vistune.data.collate import pack_row
from vistune.models.flops import attended_pairs, row_flops, work_of
from vistune.models.tune import apply_tuning
from vistune.recipe import TuneConfig
from vistune.train.work import lengths_of
from vistune.types import Batch, EncodedSample, Sample, Turn

TUNES: dict[str, dict[str, Any]] = {
    "connector": {"connector": {"mode": "full"}},
    "lora": {
        "vision": {"mode": "lora", "rank": 2},
        "connector": {"mode": "full"},
        "language": {"mode": "lora", "rank": 2},
    },
    "full": {role: {"mode": "full"} for role in ("vision", "connector", "language")},
}
UNKNOWN = {"qwen3_vl_moe", "minicpmv4_6", "mistral3", "pixtral"}
"""Experts and recurrent layers are no linear layers, and Pixtral's tower computes what it masks."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("n")
    for kind in KINDS:
        write_native(kind, root / kind)
    return root


def row_of(encoder: Any) -> Batch:
    def sample(*sizes: tuple[int, int]) -> EncodedSample:
        turns = (Turn("user", (*range(len(sizes)), "what")), Turn("assistant", ("it",)))
        images: Any = tuple(
            Image.fromarray(np.full((*size, 3), 90 + i, dtype=np.uint8))
            for i, size in enumerate(sizes)
        )
        made = Sample(id="a", source="s", where="w", turns=turns, images=images)
        found: EncodedSample = encoder.encode(made, max_tokens=10**6, overlong="error")
        return found

    return pack_row([sample((50, 90)), sample(), sample((90, 30), (33, 33))])


@pytest.mark.parametrize("name", sorted(TUNES))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_as_torch_counts_them(folders: Path, kind: str, name: str) -> None:
    loaded = load_assembled(folders / kind)
    model: Any = loaded.model
    tune = TuneConfig.model_validate(TUNES[name])
    apply_tuning(model, tune, seed=0)
    work = work_of(model, tune)
    if kind in UNKNOWN:
        assert work is None
        return
    assert work is not None
    row = row_of(loaded.encoder)
    ours = row_flops(work, lengths_of(row, reads_tail=False))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(**row.model_inputs())
        model.logits(hidden[0, row.target_index_M]).sum().backward()
    # Torch's plain attention multiplies above the diagonal too: n^2 pairs for n (n + 1) / 2.
    edges = row.cu_seqlens.diff().tolist()
    # Nor does it leave out what a window hides.
    pairs = sum(
        n * n - attended_pairs(n, queries=n, window=window)
        for n in edges
        for window in work.windows
    )
    expected = ours.total + 12 * work.attention_width * pairs
    assert ours.tower > 0 and ours.connector > 0
    # Some releases make rotary tables by a matrix product, which is not counted here.
    tables = sum(
        sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name.endswith(("rotary_emb", "rotary_pos_emb"))
    )
    assert counter.get_total_flops() - tables == expected

"""Choices in several rows: scored as in one packed row, their images seen once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_dirs import FAMILY_KINDS, TILES_KIND, write_family
from PIL import Image
from tiny_parts import composed, encoder
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "native"))

from native_dirs import write_native

from vistune.assembly import load_assembled
from vistune.data.collate import pack_row
from vistune.generate import Prompt, score_choices
from vistune.models.spliced import SplicedLanguageModel
from vistune.types import Sample, Turn

NATIVE_KINDS = ("gemma3", "idefics3", "paligemma", "qwen2_vl")
CHOICES = ["a cat", "yes", "rather more than that, and then longer", "no", "so"]


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SEEN = Prompt((Turn("user", (0, "What is it?")),), (picture(1),))
SEEN_TWICE = Prompt((Turn("user", ("Two ", 0, " and ", 1)),), (picture(2), picture(3)))
READ = Prompt((Turn("user", ("Just text.",)),))


@torch.no_grad()
def in_one_row(model: Any, coder: Any, prompt: Prompt) -> tuple[list[float], list[int]]:
    """Returns the choices' summed log-probabilities in one packed row, and their tokens."""
    images: Any = tuple(prompt.images)
    samples = [
        coder.encode(
            Sample("i", "s", "w", (*prompt.turns, Turn("assistant", (choice,))), images),
            max_tokens=10**6,
            overlong="error",
        )
        for choice in CHOICES
    ]
    row = pack_row(samples)
    logits = model.logits(model.hidden_states(**row.model_inputs())[0, row.target_index_M])
    found = torch.log_softmax(logits.float(), -1).gather(1, row.target_ids_M[:, None])[:, 0]
    sums = [float(found[row.target_sample_M == i].sum()) for i in range(len(CHOICES))]
    return sums, [sample.input_ids.size for sample in samples]


def rows_of(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> list[list[int]]:
    """Returns the list that the samples' lengths in every row will be written to."""
    rows: list[list[int]] = []
    run = getattr(model, name)

    def counted(*arguments: Any, **inputs: Any) -> Tensor:
        rows.append(inputs["cu_seqlens"].diff().tolist())
        out: Tensor = run(*arguments, **inputs)
        return out

    monkeypatch.setattr(model, name, counted)
    return rows


def check(model: Any, coder: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, lengths = in_one_row(model, coder, prompt)
    assert len(set(expected)) == len(CHOICES)
    name = "hidden_states"
    if isinstance(model, SplicedLanguageModel) and prompt.images:
        name = "decode"
    uneven = lengths[0] + lengths[1]  # two short choices fit, a short and the long one do not
    for max_tokens, sizes in ((10**6, [5]), (uneven, [2, 1, 2]), (1, [1, 1, 1, 1, 1])):
        with monkeypatch.context() as patch:
            rows = rows_of(model, patch, name)
            found = score_choices(
                model, coder, prompt, CHOICES, per_token=False, max_tokens=max_tokens
            )
        assert found == pytest.approx(expected, rel=1e-5)  # fp32 in other shapes
        assert [len(row) for row in rows] == sizes
        assert [length for row in rows for length in row] == lengths


@pytest.mark.parametrize("text", ["llama", "gemma2"])
@pytest.mark.parametrize("prompt", [SEEN, SEEN_TWICE, READ])
def test_rows_of_a_composed_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, prompt: Prompt
) -> None:
    model, facts = composed(tmp_path, text=text)
    check(model, encoder(facts), prompt, monkeypatch)


@pytest.mark.parametrize("kind", [*FAMILY_KINDS, TILES_KIND])
def test_rows_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    loaded = load_assembled(write_family(kind, tmp_path / "model"))
    check(loaded.model, loaded.encoder, SEEN, monkeypatch)


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_rows_of_a_native_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    loaded = load_assembled(write_native(kind, tmp_path / "model"))
    check(loaded.model, loaded.encoder, SEEN, monkeypatch)


def test_images_are_seen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = composed(tmp_path)
    seen: list[int] = []
    look = model.image_features

    def counted(pixel_values_NCYX: Tensor) -> Tensor:
        seen.append(len(pixel_values_NCYX))
        return look(pixel_values_NCYX)

    monkeypatch.setattr(model, "image_features", counted)
    score_choices(model, encoder(facts), SEEN_TWICE, CHOICES, max_tokens=1)
    assert seen == [2]


def test_no_choice_has_no_score(tmp_path: Path) -> None:
    model, facts = composed(tmp_path)
    assert score_choices(model, encoder(facts), SEEN, []) == []

"""Transformers' own models: the ids, positions, loss and gradients that transformers computes."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from native_dirs import KINDS, write_native
from tile_kinds import TILE_KINDS

from vistune.assembly import Assembled, load_assembled
from vistune.data.collate import pack_row
from vistune.data.layout import PatchLayout
from vistune.models.native import NativeVLM
from vistune.types import EncodedSample, Sample, Turn

PROCESSORS = {"glm4v": "Glm4vProcessor"}
"""Kinds on a grid of patches whose processor is not Qwen2-VL's."""


@pytest.fixture(scope="module", params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_native(request.param, tmp_path_factory.mktemp("n") / request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Assembled:
    return load_assembled(folder)


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    drawn = np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def encoded(encoder: Any, turns: list[Turn], sizes: list[tuple[int, int]]) -> EncodedSample:
    images: Any = tuple(picture(size, seed) for seed, size in enumerate(sizes))
    sample = Sample(id="s", source="s", where="w", turns=tuple(turns), images=images)
    found: EncodedSample = encoder.encode(sample, max_tokens=10**6, overlong="error")
    return found


def conversation(encoder: Any) -> EncodedSample:
    turns = [
        Turn("user", (0, "what?")),
        Turn("assistant", ("a thing",)),
        Turn("user", ("and ", 1, " then?")),
        Turn("assistant", ("another",)),
    ]
    if encoder.template.both_ways:  # takes one prompt
        turns = [Turn("user", (0, "what? ", 1, " and then?")), Turn("assistant", ("another",))]
    return encoded(encoder, turns, [(50, 90), (33, 40)])


def theirs(loaded: Assembled, folder: Path, sample: EncodedSample) -> tuple[Any, dict[str, Any]]:
    """Returns transformers' model as it loads by itself, and its inputs for one sample alone."""
    from transformers import AutoModelForImageTextToText

    model = loaded.model
    assert isinstance(model, NativeVLM)
    ids = torch.from_numpy(sample.input_ids)[None]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(torch.from_numpy(sample.target_mask)[None], ids, -100),
    }
    if sample.pixel_values:
        pixels = torch.from_numpy(np.concatenate(sample.pixel_values))
        inputs |= model.family.image_inputs(pixels, sample.image_shapes)
        inputs |= model.family.text_inputs(ids, model.image_token_id)
    if sample.prompt_tokens is not None:
        inputs["token_type_ids"] = (torch.arange(ids.shape[1])[None] >= sample.prompt_tokens).long()
    inner = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return inner, inputs


def test_loss_and_gradients_are_transformers(loaded: Assembled, folder: Path) -> None:
    if folder.name == "paligemma2" and not _caps_logits():
        pytest.skip("this transformers leaves out the cap on PaliGemma 2's logits")
    sample = conversation(loaded.encoder)
    inner, inputs = theirs(loaded, folder, sample)
    inner.train(False)
    expected = inner(**inputs).loss
    expected.backward()

    model: Any = loaded.model
    model.requires_grad_(True)
    row = pack_row([sample])
    hidden = model.hidden_states(**row.model_inputs())
    logits = model.logits(hidden[0, row.target_index_M])
    loss = torch.nn.functional.cross_entropy(logits, row.target_ids_M)
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    # fp32 with another order of operations (eager attention there, packed here).
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)
    wanted = {f"inner.{n}": p.grad for n, p in inner.named_parameters() if p.grad is not None}
    found: dict[str, Tensor] = {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():  # a key's bias has none but rounding: 1e-8
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, name
    model.requires_grad_(False)
    model.zero_grad()


def _caps_logits() -> bool:
    from transformers import PaliGemmaForConditionalGeneration

    return "softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward)


def test_ids_and_pixels_are_the_processors(loaded: Assembled, folder: Path) -> None:
    layout = loaded.encoder.layout
    if not isinstance(layout, PatchLayout) or folder.name in TILE_KINDS:
        pytest.skip("another layout; its own tests compare it")
    import transformers

    name = PROCESSORS.get(folder.name, "Qwen2VLProcessor")
    made = type(name, (getattr(transformers, name),), {"check_argument_for_proper_class": _any})
    processor = made(layout.image_processor, loaded.encoder.tokenizer)
    turns = [Turn("user", (0, "what? ", 1, "and?"))]
    pictures = [picture((50, 90), 0), picture((9, 64), 1)]
    ours = loaded.encoder.encode_prompt(turns, pictures)
    open_close = loaded.encoder.template.image_text  # type: ignore[attr-defined]
    text = "".join(
        part if isinstance(part, str) else open_close for part in (0, "what? ", 1, "and?")
    )
    text = loaded.encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    out = processor(images=pictures, text=[text], return_tensors="np")
    assert np.array_equal(out["input_ids"][0], ours.input_ids)
    assert np.array_equal(out["pixel_values"], np.concatenate(ours.pixel_values))
    assert out["image_grid_thw"].tolist() == [list(shape) for shape in ours.image_shapes]


def _any(*_: Any) -> None:
    """A processor checks that it has a processor of videos too, which needs torchvision."""


def test_positions_are_transformers(loaded: Assembled) -> None:
    encoder, model = loaded.encoder, loaded.model
    if not isinstance(encoder.layout, PatchLayout):
        pytest.skip("positions of this kind count 0, 1, 2")
    assert isinstance(model, NativeVLM)
    draw = random.Random(3)
    for _ in range(60):
        number = draw.randint(0, 4)
        sizes = [(draw.randint(4, 120), draw.randint(4, 120)) for _ in range(number)]
        parts: list[int | str] = []
        for index in range(number):
            parts += [index, "x" * draw.randint(0, 5)]
        first = tuple(part for part in ["a", *parts] if part != "")
        turns = [Turn("user", first), Turn("assistant", ("b" * draw.randint(1, 9),))]
        sample = encoded(encoder, turns, sizes)
        ids = torch.from_numpy(sample.input_ids)[None]
        assert sample.position_ids is not None
        told = model.family.text_inputs(ids, model.image_token_id)
        grids = torch.tensor(sample.image_shapes, dtype=torch.int64) if number else None
        expected, _ = model.inner.model.get_rope_index(
            ids, image_grid_thw=grids, attention_mask=torch.ones_like(ids), **told
        )
        assert np.array_equal(sample.position_ids, expected[:, 0].numpy())

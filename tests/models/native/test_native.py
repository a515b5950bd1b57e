"""Transformers' own models: tokens as their processors make them, packed as alone, trained."""

from __future__ import annotations

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

from vistune.assembly import Assembled, load_assembled
from vistune.data.collate import pack_row
from vistune.generate import Prompt, generate
from vistune.models.native import NativeVLM
from vistune.types import EncodedSample, Sample, Turn

SIZES = ((50, 90), (90, 30), (9, 64), (33, 33), (200, 300))


@pytest.fixture(scope="module", params=sorted(KINDS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    torch.set_num_threads(1)
    return load_assembled(write_native(request.param, tmp_path_factory.mktemp("n") / "model"))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    drawn = np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def sample_of(encoder: Any, *sizes: tuple[int, int], text: str = "what?") -> EncodedSample:
    parts = (*range(len(sizes)), text)
    turns = (Turn("user", parts), Turn("assistant", (f"it is {text}",)))
    images: Any = tuple(picture(size, seed) for seed, size in enumerate(sizes))
    sample = Sample(id=text, source="s", where="w", turns=turns, images=images)
    encoded: EncodedSample = encoder.encode(sample, max_tokens=10**6, overlong="error")
    assert len(encoded.image_shapes) == len(sizes)
    return encoded


def run(model: Any, samples: list[EncodedSample]) -> tuple[Tensor, Tensor]:
    """Returns the row's logits at its targets, and the targets."""
    row = pack_row(samples)
    hidden = model.hidden_states(**row.model_inputs())
    return model.logits(hidden[0, row.target_index_M]), row.target_ids_M


@pytest.mark.parametrize("size", SIZES)
def test_block_and_pixels_agree(loaded: Assembled, size: tuple[int, int]) -> None:
    layout = loaded.encoder.layout
    assert layout is not None
    block = layout.block(*size)
    assert layout.num_tokens(*size) == block.size
    assert layout.pixels(picture(size)).shape[0] == layout.num_inputs(*size)


def test_packed_is_alone_in_loss_and_gradients(loaded: Assembled) -> None:
    # fp32 with other shapes of products: 2e-5 of the largest gradient.
    model, encoder = loaded.model, loaded.encoder
    model.requires_grad_(True)
    samples = [
        sample_of(encoder, (50, 90), text="one"),
        sample_of(encoder, text="no picture"),
        sample_of(encoder, (90, 30), (33, 33), text="two pictures"),
    ]

    def gradients(rows: list[list[EncodedSample]]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        total = 0.0
        for row in rows:
            logits, targets = run(model, row)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return total, found

    together, packed = gradients([samples])
    apart, single = gradients([[sample] for sample in samples])
    assert together == pytest.approx(apart, rel=2e-6)
    learns = dict(model.named_parameters()).keys() - model.never_trained
    assert packed.keys() == single.keys() == learns
    for name, gradient in packed.items():
        scale = float(single[name].abs().max()) + 1e-6
        if name.endswith("k_proj.bias") and model.module_map.role_of(name) == "vision":
            scale = 1.0  # it changes no softmax without positions: rounding and nothing else
        assert (gradient - single[name]).abs().max() / scale < 2e-5, name
    model.requires_grad_(False)


def test_another_sample_changes_nothing(loaded: Assembled) -> None:
    model, encoder = loaded.model, loaded.encoder
    mine = sample_of(encoder, (50, 90), text="mine")
    with torch.no_grad():
        num = int(mine.target_mask.sum())
        first, _ = run(model, [sample_of(encoder, (33, 33), text="aa"), mine])
        other = sample_of(encoder, (33, 33), text="bb")
        second, _ = run(model, [other, mine])
        assert not torch.equal(first[:-num], second[:-num])
        assert torch.equal(first[-num:], second[-num:])


def test_text_alone_touches_every_weight(loaded: Assembled) -> None:
    model = loaded.model
    assert isinstance(model, NativeVLM)
    model.requires_grad_(True)
    model.zero_grad()
    logits, _ = run(model, [sample_of(loaded.encoder, text="no picture")])
    logits.sum().backward()  # type: ignore[no-untyped-call]
    missing = {n for n, p in model.named_parameters() if p.grad is None}
    assert missing == model.never_trained
    for name, parameter in model.named_parameters():
        if name not in missing and model.module_map.role_of(name) in ("vision", "connector"):
            assert parameter.grad is not None and not parameter.grad.any()
    model.zero_grad()
    model.requires_grad_(False)


def test_every_parameter_has_a_role(loaded: Assembled) -> None:
    roles = {loaded.model.module_map.role_of(n) for n, _ in loaded.model.named_parameters()}
    assert {"vision", "connector", "language"} <= roles


def test_answers_in_a_batch_as_alone_and_as_without_cache(loaded: Assembled) -> None:
    model, encoder = loaded.model, loaded.encoder
    prompts = [
        Prompt([Turn("user", (0, "what?"))], [picture((50, 90))]),
        Prompt([Turn("user", ("hi ", 0, " longer?", 1))], [picture((90, 30)), picture((33, 33))]),
    ]
    together = generate(model, encoder, prompts, max_new_tokens=6)
    alone = [generate(model, encoder, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    for prompt, answer in zip(prompts, alone, strict=True):
        encoded = encoder.encode_prompt(prompt.turns, prompt.images)
        assert _without_cache(model, encoder, encoded, 6) == answer


@torch.no_grad()
def _without_cache(model: Any, encoder: Any, prompt: EncodedSample, number: int) -> str:
    """Greedy answer by running the packed row again for every token."""
    ids = prompt.input_ids
    said: list[int] = []
    for _ in range(number):
        whole = np.concatenate([ids, np.array(said, dtype=np.int64)])
        shapes = prompt.image_shapes
        row = pack_row(
            [
                EncodedSample(
                    id="a",
                    source="",
                    input_ids=whole,
                    target_mask=np.zeros(whole.size, dtype=np.bool_),
                    pixel_values=prompt.pixel_values,
                    image_shapes=shapes,
                    position_ids=encoder.layout.positions(whole, shapes),
                    prompt_tokens=prompt.prompt_tokens,
                )
            ]
        )
        logits_V = model.logits(model.hidden_states(**row.model_inputs())[0, -1:])[0]
        logits_V[encoder.image_token_id] = float("-inf")
        token = int(logits_V.argmax())
        if token in encoder.stop_token_ids:
            break
        said.append(token)
    return str(encoder.tokenizer.decode(said, skip_special_tokens=True))
